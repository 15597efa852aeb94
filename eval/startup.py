"""What `prime_v2_lm_eval.pth` calls in a process of lm-eval: `prime_v2` is registered once `lm_eval.models` is loaded.

Releases of lm-eval after 0.4.13 find the model by the entry point in setup.cfg; there this does nothing.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AWAITED = "lm_eval.models"
LAST_WITHOUT_DISCOVERY = (0, 4, 13)


class _Finder:
    """Lets the other finders find `lm_eval.models`, and has the registration follow its import. Works once."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            # A loader that takes no attributes: lm-eval goes on without the model.
            with suppress(TypeError):
                _register_after(spec.loader)
        return spec


def _register_after(loader: Any) -> None:
    """Have this loader's next `exec_module` register the model when it is done."""

    def exec_module(module: ModuleType) -> None:
        del vars(loader)["exec_module"]
        loader.exec_module(module)
        _register()

    vars(loader)["exec_module"] = exec_module


def _register() -> None:
    try:
        version = sys.modules["lm_eval"].__version__
        if tuple(int(each) for each in re.findall(r"\d+", version)[:3]) <= LAST_WITHOUT_DISCOVERY:
            from prime_v2.eval.plugin import register

            register()
    except Exception as error:
        print(f"prime_v2 is not registered with lm-eval: {type(error).__name__}: {error}", file=sys.stderr)


def install() -> None:
    """Register the model as soon as this process has imported `lm_eval.models`; nothing is imported here."""
    if AWAITED not in sys.modules:
        sys.meta_path.insert(0, _Finder())
