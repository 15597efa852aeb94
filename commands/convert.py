"""`prime-v2 convert`: a published checkpoint file to a folder that Transformers loads (docs/convert.md)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prime_v2.commands.options import FOLDER, Json


@dataclass(frozen=True)
class Source:
    """A checkpoint file and what it does not hold itself."""

    checkpoint: Path
    tokenizer: str
    permutation: Path | None = None
    base: int = 2
    num_heads: int | None = None
    max_length: int = 2048
    drop_padding: bool = False


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The published file, .pth or .safetensors.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder, or an empty one.", callback=FOLDER)],
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_DIR", help="The fast tokenizer that the model was trained with.")
    ],
    permutation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The index shuffle of a model over sub-tokens: .pt, .npy or .json [default: whole tokens].",
        ),
    ] = None,
    base: Annotated[int, typer.Option(min=2, metavar="B", help="Values of a digit, with --permutation.")] = 2,
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Attention heads.", show_default="those of the published sizes"),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the longest training text.")] = 2048,
    drop_padding: Annotated[
        bool, typer.Option("--drop-padding", help="Leave out rows of the head past the tokenizer's tokens.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a published checkpoint for Transformers.

    The file is of MDM-Prime-v2 or SMDM; the folder gets configuration, weights, tokenizer, code and card.

    \b
    prime-v2 convert mdm-prime-v2.pth OUT --permutation perm_32768.pt --tokenizer my_tokenizer/
    prime-v2 convert mdm-1028M-1600e18.safetensors OUT --tokenizer my_tokenizer/

    docs/convert.md has the names of the published files.
    """
    from prime_v2.output.progress import quiet_libraries

    quiet_libraries()
    source = Source(checkpoint, tokenizer, permutation, base, num_heads, max_length, drop_padding)
    written = convert_checkpoint(source, out)
    if as_json:
        print(json.dumps(written, indent=1))
        return
    config = written["config"]
    digits = f"{config['num_subtokens']} digits of base {config['base']}" if permutation else "whole tokens"
    print(
        f"wrote {written['folder']}: {written['parameters']:,} parameters in {config['dtype']}, "
        f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, {config['vocab_size']:,} tokens, {digits}"
    )
    if written["dropped_rows"]:
        print(f"{written['dropped_rows']} rows of the head were dropped; the published softmax also ran over them")
    print(f"files: {', '.join(written['files'])}")


def convert_checkpoint(source: Source, out: Path) -> dict[str, Any]:
    """Write the folder `out` whole, or nothing. Returns what was written: folder, files, config, parameters, ...

    Raises ValueError for a file, tokenizer, permutation or folder that does not fit, OSError where it cannot write.
    """
    import torch

    from prime_v2.configuration_prime_v2 import PrimeV2Config
    from prime_v2.hub_card import convert as lit_gpt
    from prime_v2.hub_card.convert_card import render_converted_card
    from prime_v2.hub_card.convert_files import read_permutation, read_tensors
    from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion
    from prime_v2.output.atomic import folder_written_whole
    from prime_v2.output.seals import sha256_of

    out = _check_out(out)
    permutation = None if source.permutation is None else read_permutation(source.permutation)
    tensors = read_tensors(source.checkpoint)
    lit_gpt.refuse_layout(tensors)
    try:
        sizes = lit_gpt.sizes_of(tensors, source.base, permutation is not None, source.num_heads)
    except ValueError as error:
        raise ValueError(f"{source.checkpoint}: {error}") from None
    tokenizer = _tokenizer(source, sizes, permutation)
    parameters = tokenizer.code_table_parameters
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = PrimeV2Config(**parameters, **special, **sizes.config_fields(source.max_length))
    weights = lit_gpt.our_weights(tensors, sizes, config.vocab_size)
    weights["code_table.codes"] = torch.as_tensor(tokenizer.encode_subtokens(range(config.vocab_size + 1)))
    with torch.device("meta"):
        model = PrimeV2ForMaskedDiffusion(config)
    model.load_state_dict(weights, assign=True)
    facts: dict[str, Any] = {
        "sha256": sha256_of(source.checkpoint),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    dropped = sizes.rows - config.vocab_size
    card = render_converted_card(
        config.to_dict(),
        model_name=out.name,
        source=source.checkpoint.name,
        permutation=None if source.permutation is None else source.permutation.name,
        dropped=dropped,
        **facts,
    )

    with folder_written_whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
    return {"folder": str(out), "files": files, **facts, "dropped_rows": dropped, "config": config.to_dict()}


def _check_out(out: Path) -> Path:
    """The folder to write, absolute; ValueError where there is something already, or no place for it."""
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; give another name, or empty it first")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} does not exist; make it first")
    return out


def _tokenizer(source: Source, sizes: Any, permutation: Any) -> Any:
    """The PrimeV2Tokenizer whose code table is the model's."""
    from prime_v2.eval.loading import load_tokenizer
    from prime_v2.hub_card.convert import check_rows, codes_of
    from prime_v2.tokenization import build_tokenizer
    from prime_v2.tokenization.build import recode_tokenizer

    whole = build_tokenizer(load_tokenizer(source.tokenizer), num_subtokens=1, shuffle_ratio=0.0)
    vocab_size = len(whole.code_table)
    check_rows(sizes, vocab_size, source.drop_padding)
    if permutation is None:
        return whole
    return recode_tokenizer(whole, sizes.base, codes=codes_of(permutation, sizes, vocab_size).numpy())
