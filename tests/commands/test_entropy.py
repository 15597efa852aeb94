"""`prime-v2 entropy`."""

import json

from command_runs import DOCUMENTS, refused, run

from prime_v2.eval.loading import load_tokenizer
from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.tokenization import count_tokens, entropy_table
from prime_v2.tokenization.bpe import train_bpe


def test_entropy_prints_and_records_the_table(model_dir, text_file, tmp_path):
    counts = count_tokens(DOCUMENTS, load_tokenizer(model_dir))
    output = tmp_path / "record.json"
    arguments = ["entropy", text_file, "--tokenizer", model_dir, "--shuffle-seed", 2, "--shuffle-domain", "vocab"]
    printed = json.loads(run(*arguments, "--json", "--output", output).stdout)
    assert printed["rows"] == entropy_table(counts, 280, 2, "vocab")
    assert (printed["num_tokens"], printed["vocab_size"]) == (int(counts.sum()), 280)
    assert read_record(output)["results"] == without_places(printed)
    plain = run(*arguments).stdout
    assert "Mean sub-token entropy" in plain
    assert f"{printed['rows'][-1]['shuffled']:.4f}" in plain


def test_entropy_takes_any_fast_tokenizer(text_file, tmp_path):
    bpe = train_bpe(DOCUMENTS, 270)
    bpe.save(str(tmp_path / "tokenizer.json"))
    printed = json.loads(run("entropy", text_file, "--tokenizer", tmp_path / "tokenizer.json", "--json").stdout)
    assert printed["vocab_size"] == 270
    assert printed["num_tokens"] == sum(len(bpe.encode(text).ids) for text in DOCUMENTS)
    (tmp_path / "nothing").mkdir()
    assert "has no tokenizer" in refused("entropy", text_file, "--tokenizer", tmp_path / "nothing")
    assert "Missing option '--tokenizer'" in refused("entropy", text_file)
