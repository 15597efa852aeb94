"""The command `prime-v2` and the list of its sub-commands.

Each sub-command stands in the file of its name: its options, and its work, which imports what it needs when it runs,
so that `--help` answers at once.
"""

import sys
from typing import Annotated

import typer

from prime_v2.commands.analyze import analyze
from prime_v2.commands.base import PROGRAM, Command, new_app
from prime_v2.commands.card import card
from prime_v2.commands.compare import compare
from prime_v2.commands.convert import convert
from prime_v2.commands.demo import demo
from prime_v2.commands.entropy import entropy
from prime_v2.commands.eval import evaluate
from prime_v2.commands.generate import generate
from prime_v2.commands.overlap import overlap
from prime_v2.commands.ppl import ppl
from prime_v2.commands.quality import quality
from prime_v2.commands.scaling import scaling_app
from prime_v2.commands.tasks import tasks

app = new_app(PROGRAM, "MDM-Prime-v2: sample from masked diffusion language models over sub-tokens, and measure them.")


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False):
    if version:
        from prime_v2 import __version__

        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


app.command(cls=Command)(generate)
app.command(cls=Command)(ppl)
app.command(cls=Command)(quality)
app.command(cls=Command)(entropy)
app.command(cls=Command)(overlap)
# Options of other programs pass through, lm-eval's -h among them.
PASS_ON = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
app.command("eval", cls=Command, context_settings=PASS_ON)(evaluate)
app.command(cls=Command)(tasks)
app.command(cls=Command)(analyze)
app.command(cls=Command)(card)
app.command(cls=Command)(compare)
app.command(cls=Command)(convert)
app.command(cls=Command, context_settings=PASS_ON)(demo)
app.add_typer(scaling_app)


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text that the terminal's encoding lacks must not end the command
    app()


if __name__ == "__main__":
    main()
