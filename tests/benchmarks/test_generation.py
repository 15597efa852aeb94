"""The benchmark of `generate` in a tiny form: its record, and the table made of it."""

import json
import runpy
import sys
from pathlib import Path

from docs.tables.benchmarks import generation_table
from tests.saved_models import save_model

ROOT = Path(__file__).resolve().parents[2]


def test_the_record_holds_speed_blocks_and_shares_and_makes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    main = runpy.run_path(str(ROOT / "benchmarks" / "generation.py"))["main"]
    main.__globals__["CASES"] = ((64, 6, 4),)
    sizes = "--hidden-size 64 --layers 1 --batch 2 --steps 2 --repeats 1 --block-tokens 16 --block 4 --block-batch 1"
    shares = "--share-vocab 300 --share-hidden-size 64 --share-layers 1 --share-batch 1 --share-tokens 4"
    save_model(tmp_path / "trained", [" ".join(f"word{number}" for number in range(300))], max_position_embeddings=16)
    trained = ["--model", str(tmp_path / "trained"), "--model-batch", "2"]
    main([*sizes.split(), *shares.split(), *trained, "--output", str(tmp_path / "generation.json")])
    results = json.loads((tmp_path / "generation.json").read_text())["results"]
    assert [(row["prompt"], row["new_tokens"]) for row in results["blocks"]] == [(0, 16), (8, 8)] * 2
    assert [row["model"] for row in results["blocks"]] == ["random weights"] * 2 + ["trained"] * 2
    assert results["blocks"][2]["deviation_stderr"]["dual"] is not None
    assert all(row["nats_per_token"]["none"] > 0 for row in results["blocks"])
    assert len(results["shares"]) == 2 + 5 * 3
    assert all(0 < row["share"] < 1 for row in results["shares"])
    table = generation_table(tmp_path)
    assert table.count("| prefix |") == table.count("| dual |") == 4
    assert "| entropy-bound | stage |" in table
