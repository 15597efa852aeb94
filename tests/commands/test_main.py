"""The command `prime-v2`: what it prints where, and one sentence with status 2 for bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from command_runs import refused, run
from rich.console import Console

from prime_v2 import (
    PrimeV2ArmConfig,
    PrimeV2Config,
    PrimeV2ForCausalLM,
    PrimeV2ForMaskedDiffusion,
    build_tokenizer,
)
from prime_v2.commands.base import bad_input
from prime_v2.commands.generate import PICTURES, DraftView
from prime_v2.commands.ppl import render_score
from prime_v2.data.splits import split_of
from prime_v2.eval.loading import load_model_and_tokenizer, load_tokenizer
from prime_v2.eval.perplexity import score_text
from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.output.trace_picture import printable
from prime_v2.tokenization import count_tokens, entropy_table
from prime_v2.tokenization.bpe import train_bpe

DOCUMENTS = [f"document {i} says that the quick brown fox jumps over {i * 7} lazy dogs" for i in range(12)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe(DOCUMENTS, 280), special_tokens={"eos_token": "<|endoftext|>"})
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=280, eos_token_id=0, pad_token_id=0, **shape))
    folder = tmp_path_factory.mktemp("cli") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def broken(model_dir, tmp_path) -> Path:
    """A copy of the model to break."""
    return shutil.copytree(model_dir, tmp_path / "broken")


# ------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("command", ["generate", "ppl", "entropy", "card"])
def test_help_names_arguments_and_options(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert result.stdout.startswith(f"Usage: prime-v2 {command} ")
    assert command in run("--help").stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from prime_v2.commands.main import app\n"
        "try: app(['ppl', '--help'])\n"
        "except SystemExit: pass\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('prime_v2.')}\n"
        "print(*sorted(rooms | {'torch', 'transformers', 'numpy', 'datasets', 'rich', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "commands output"


def test_version_and_no_arguments():
    assert run("--version").stdout == "prime-v2 0.1.0\n"
    result = run()
    assert (result.exit_code, result.stderr) == (2, "")
    assert "Commands:" in result.stdout


def test_unknown_commands_and_options_are_refused_in_one_sentence(model_dir):
    result = run("train")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("prime-v2: error: No such command 'train'")
    assert "No such option: --speed" in refused("generate", model_dir, "--speed")
    assert "Missing argument 'SOURCE'" in refused("ppl", model_dir)
    assert "'guess' is not one of 'causal'" in refused("ppl", model_dir, "docs", "--method", "guess")
    assert "'--num-samples'" in refused("generate", model_dir, "--num-samples", 0)


def test_too_little_memory_is_a_sentence():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert bad_input(error).startswith("not enough memory; ask for less at once")


def test_faults_of_ours_keep_their_traceback():
    assert bad_input(RuntimeError("a fault")) is None
    assert bad_input(BrokenPipeError(32, "Broken pipe")) is None
    assert bad_input(OverflowError("a fault")) is None
    assert bad_input(ValueError("two\n lines.")) == "two lines"
    assert bad_input(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: No such file"
    with pytest.raises(Exception, match="does not fit in num_subtokens=2") as caught:
        PrimeV2Config(vocab_size=10, base=2, num_subtokens=2)
    assert bad_input(caught.value).startswith("vocab_size=10 does not fit in num_subtokens=2")


def test_the_real_command_keeps_stdout_json_and_stderr_one_line(model_dir, text_file, tmp_path):
    prime = [sys.executable, "-m", "prime_v2.commands.main"]
    scored = [*prime, "ppl", model_dir, text_file, "--json", "--num-samples", "2", "--method", "paper_loss"]
    done = subprocess.run(scored, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["evaluation"]["is_bound"] is False

    done = subprocess.run([*scored, "--output", "."], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prime-v2 ppl: error: --output . exists")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- loading


def test_model_and_tokenizer_are_loaded_in_float32_on_the_cpu(model_dir):
    model, tokenizer = load_model_and_tokenizer(model_dir, device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert (model.code_table.codes[:-1].numpy() == tokenizer.code_table).all()
    assert load_model_and_tokenizer(str(model_dir), "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_folders_that_hold_no_whole_model_are_refused(broken):
    def refusal() -> str:
        return refused("generate", broken, "--max-new-tokens", 2)

    (broken / "tokenizer.json").rename(broken / "kept.json")
    assert "has no tokenizer" in refusal()
    (broken / "tokenizer.json").write_text('{"broken": true}')
    assert "does not hold a tokenizer that can be loaded" in refusal()
    (broken / "kept.json").rename(broken / "tokenizer.json")

    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:500])
    assert "cannot be loaded" in refusal()
    (broken / "model.safetensors").unlink()
    assert "has no weights (model.safetensors or" in refusal()
    (broken / "model.safetensors").write_bytes(weights)

    config = json.loads((broken / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2'"),
        ({"num_hidden_layers": 2}, "lack 9 tensors that config.json asks for"),
        ({"hidden_size": 32, "intermediate_size": 64}, "have other shapes for"),
        ({"shuffle_ratio": 2}, "shuffle_ratio=2 is outside [0, 1]"),
    ):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        assert message in refusal()
    (broken / "config.json").write_text("[1")
    assert "config.json is not JSON" in refusal()
    (broken / "config.json").unlink()
    assert "has no config.json" in refusal()


def test_a_tokenizer_with_another_code_table_is_refused(broken):
    table = json.loads((broken / "code_table.json").read_text())
    table["codes"][5], table["codes"][9] = table["codes"][9], table["codes"][5]
    (broken / "code_table.json").write_text(json.dumps(table))
    assert "the codes are not those of codes_sha256=" in refused("generate", broken)
    del table["codes_sha256"]  # as in files of before there were hashes
    (broken / "code_table.json").write_text(json.dumps(table))
    assert "differs from the model's (2 of 280 tokens, the first being 5)" in refused("generate", broken)


def test_places_that_hold_nothing_are_refused(tmp_path, text_file):
    assert "does not exist; give a folder" in refused("generate", tmp_path / "nowhere")
    assert "is a file; give a folder" in refused("generate", text_file)
    assert "is neither a folder here nor a model" in refused("generate", "someone/something")
    assert "the name is empty" in refused("generate", "")


def test_devices_and_types_that_are_not_here_are_refused(model_dir):
    assert "--device nowhere cannot be used here" in refused("generate", model_dir, "--device", "nowhere")
    assert "--dtype int8 is not a floating-point type" in refused("generate", model_dir, "--dtype", "int8")


# ------------------------------------------------------------------------------------------------- generate


def test_generate_repeats_itself_for_a_seed_and_draws_several_samples(model_dir):
    arguments = ["generate", model_dir, "--prompt", "the", "--suffix", " dogs", "--max-new-tokens", 6, "--seed", 3]
    first, again = (json.loads(run(*arguments, "--num-samples", 3, "--json").stdout) for _ in range(2))
    assert first["samples"] == again["samples"]
    assert len({sample["text"] for sample in first["samples"]}) == 3
    for sample in first["samples"]:
        assert sample["text"] == "the" + sample["completion"] + " dogs"
        assert 1 <= sample["num_forward"] <= 6 * 9
    assert first["options"] == {"max_new_tokens": 6, "seed": 3}

    other = json.loads(run(*arguments[:-1], 4, "--json").stdout)
    assert other["samples"][0]["text"] != first["samples"][0]["text"]
    plain = run(*arguments).stdout
    assert plain == json.loads(run(*arguments, "--json").stdout)["samples"][0]["text"].translate(PICTURES) + "\n"


def test_generate_without_prompt_or_seed_reports_the_seed_it_drew(model_dir):
    options = ["--max-new-tokens", 4, "--max-denoising-steps", 3, "--temperature", 0.8, "--top-p", 0.9]
    drawn = json.loads(run("generate", model_dir, *options, "--num-samples", 2, "--json").stdout)
    assert all(sample["num_forward"] <= 3 for sample in drawn["samples"])
    seed = drawn["options"]["seed"]
    again = run("generate", model_dir, *options, "--num-samples", 2, "--json", "--seed", seed)
    assert json.loads(again.stdout)["samples"] == drawn["samples"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", 0], "--temperature 0.0 must be positive"),
        (["--temperature", "nan"], "--temperature nan must be positive"),
        (["--top-p", 1.5], "--top-p 1.5 is outside"),
        (["--max-new-tokens", 999], "max_position_embeddings=64"),
        (["--watch", "--json"], "--watch and --json exclude each other"),
        (["--watch", "--num-samples", 2], "--watch shows one sample"),
        (["--greedy", "--num-samples", 2], "--greedy has one result, not --num-samples 2"),
        (
            ["--greedy", "--top-p", 0.5, "--seed", 1],
            "--greedy, the deterministic decode, has no use for --top-p 0.5",
        ),
    ],
)
def test_generate_refuses_bad_options(model_dir, options, message):
    assert message in refused("generate", model_dir, *options)


def test_greedy_generates_without_a_seed_and_the_model_s_own_choice_can_be_overruled(broken):
    arguments = ["generate", broken, "--prompt", "the", "--max-new-tokens", 6, "--json"]
    greedy = json.loads(run(*arguments, "--greedy").stdout)
    assert greedy["options"] == {"max_new_tokens": 6, "do_sample": False}
    (broken / "generation_config.json").write_text('{"do_sample": false}')
    own = json.loads(run(*arguments).stdout)
    assert (own["options"], own["samples"]) == ({"max_new_tokens": 6}, greedy["samples"])
    sampled = json.loads(run(*arguments, "--sample", "--seed", 3).stdout)
    assert sampled["options"] == {"max_new_tokens": 6, "seed": 3, "do_sample": True}
    assert sampled["samples"][0]["text"] != greedy["samples"][0]["text"]


def test_watch_writes_no_control_codes_where_there_is_no_terminal(model_dir):
    result = run("generate", model_dir, "--max-new-tokens", 8, "--seed", 0, "--watch")
    assert result.exit_code == 0
    assert not any(ord(each) < 32 and each not in "\n\t" for each in result.stdout)
    assert "░" not in result.stdout
    assert "\x1b[31m\r".translate(PICTURES) == "␛[31m␍"


def test_draft_view_shades_tokens_by_their_known_digits(model_dir):
    tokenizer = load_tokenizer(model_dir)
    with open(os.devnull, "w") as nowhere:
        view = DraftView(tokenizer, 2, Console(file=nowhere), frame_seconds=0)
        prefix, known = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in ("the", " fox")
        )
        view.put(prefix)
        hidden = torch.full((1, 3), tokenizer.mask_token_id)
        draft = torch.cat([known, hidden], dim=1)
        states = torch.full((1, prefix.shape[1] + draft.shape[1], 9), 2)
        states[0, -2, :4] = states[0, -1, :8] = 1
        view.put_states(torch.cat([prefix, draft], dim=1), states)
        view.put_draft(draft)
        view.put(draft)
        view.end()
    total = draft.shape[1]
    assert view.render(draft[0].tolist()).plain == f"the fox░▒▓\n\n{total - 3} of {total} tokens known"


def test_watch_on_a_terminal_shows_drafts_and_leaves_the_text(model_dir):
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    arguments = ["generate", str(model_dir), "--prompt", "the", "--max-new-tokens", "3", "--seed", "0"]
    code = "from prime_v2.commands.main import app; app()"
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-c", code, *arguments, "--watch"]
    with subprocess.Popen(command, stdout=child, stderr=subprocess.PIPE, env=environment) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        errors = process.stderr.read()
    os.close(parent)
    assert (process.returncode, errors) == (0, b"")
    text = shown.decode()
    assert "░░░" in text
    assert "0 of 3 tokens known" in text
    # The last thing on the terminal is the text, as it is without a terminal.
    assert text.replace("\r\n", "\n").endswith(run(*arguments).stdout)


def test_the_picture_shows_the_text_that_is_printed_and_is_the_same_for_the_same_seed(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--prompt", "the", "--max-new-tokens", 6, "--seed", 4]
    plain = run(*arguments).stdout
    pictures = []
    for name in ("a.svg", "b.svg"):
        assert run(*arguments, "--picture", tmp_path / name).stdout == plain
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(pictures[0])
    (sample,) = json.loads(run(*arguments, "--json").stdout)["samples"]
    assert picture.find(f"{svg}desc").text == printable(sample["text"])
    assert "pass 0" in [each.text for each in picture.iter(f"{svg}text")]

    assert "exists; give another name" in refused(*arguments, "--picture", tmp_path / "a.svg")
    several = refused(*arguments, "--picture", tmp_path / "c.svg", "--num-samples", 2)
    assert several == "--picture shows one sample, not --num-samples 2; leave one of the two out"
    assert not (tmp_path / "c.svg").exists()


def test_a_greedy_picture_needs_no_seed(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--max-new-tokens", 3, "--greedy", "--json"]
    result = run(*arguments, "--picture", tmp_path / "greedy.svg")
    assert json.loads(result.stdout)["samples"][0]["num_forward"] == 3
    assert (tmp_path / "greedy.svg").read_text().count(">pass ") == 4


def test_a_model_that_writes_left_to_right_has_no_picture(tmp_path):
    folder = tmp_path / "arm"
    tokenizer = build_tokenizer(
        train_bpe(DOCUMENTS, 280), num_subtokens=1, special_tokens={"eos_token": "<|endoftext|>"}
    )
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PrimeV2ForCausalLM(PrimeV2ArmConfig(vocab_size=280, eos_token_id=0, **shape)).save_pretrained(folder)
    sentence = refused("generate", folder, "--prompt", "the", "--picture", tmp_path / "arm.svg")
    assert sentence.startswith("--picture shows hidden tokens as they become known, but this model writes from left")


# ------------------------------------------------------------------------------------------------- ppl


def test_ppl_prints_and_records_the_score_of_the_text(model_dir, text_file, tmp_path):
    model, tokenizer = load_model_and_tokenizer(model_dir, "cpu")
    expected = score_text(model, tokenizer, DOCUMENTS, num_samples=4, seed=1, keep_sequences=True)
    output = tmp_path / "record.json"
    arguments = ["ppl", model_dir, text_file, "--num-samples", 4, "--seed", 1, "--device", "cpu"]
    result = run(*arguments, "--json", "--output", output)
    printed = json.loads(result.stdout)
    assert printed["evaluation"] == expected
    record = read_record(output)
    assert record["results"] == without_places(printed)
    assert (record["name"], record["seed"]) == ("ppl", 1)
    assert str(tmp_path) not in json.dumps(record["results"])
    assert "exists; give another name" in refused(*arguments, "--output", output)

    short = json.loads(run(*arguments, "--json").stdout)["evaluation"]
    assert short == {name: expected[name] for name in expected if name not in ("nats_of_sequences", "clusters")}
    plain = run(*arguments).stdout
    half = expected["nats_per_token_interval_95"][1] - expected["nats_per_token"]
    assert f"{expected['nats_per_token']:.4f} ± {half:.4f} nats/token (bound)" in plain
    assert f"≤ {expected['perplexity']:.2f}  (95% interval" in plain
    assert f"12 documents, {expected['num_tokens']:,} tokens" in plain


def test_ppl_of_what_is_no_bound_is_never_a_perplexity(model_dir, text_file):
    plain = run("ppl", model_dir, text_file, "--method", "paper_loss", "--max-documents", 2).stdout
    assert "nats/token (not a bound)" in plain
    assert "2 documents" in plain
    assert "perplexity" not in plain
    assert "bits" not in plain


def test_ppl_of_the_chain_is_exact(model_dir, text_file):
    plain = run("ppl", model_dir, text_file, "--method", "chain", "--max-documents", 1).stdout
    assert "nats/token (exact, left to right)" in plain
    assert "perplexity       = " in plain
    assert "draws" not in plain
    assert "1 document, " in plain


def test_ppl_takes_the_bound_of_the_order_that_the_model_was_trained_with(broken, text_file):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "reveal_order": "token"}))
    printed = json.loads(run("ppl", broken, text_file, "--max-documents", 2, "--json").stdout)
    assert printed["evaluation"]["method"] == "token"


def test_ppl_reads_the_documents_that_a_run_held_out(broken, text_file):
    shares = {"seed": 5, "dev_share": 0.2, "test_share": 0.5}
    (broken / "run.json").write_text(json.dumps({**shares, "learning_rate": 1.0}))
    held_out = [text for text in DOCUMENTS if split_of(text, **shares) == "test"]
    printed = json.loads(run("ppl", broken, text_file, "--split", "test", "--json", "--num-samples", 1).stdout)
    assert printed["evaluation"]["num_documents"] == len(held_out)
    assert printed["evaluation"]["text_bytes"] == sum(map(len, held_out))
    assert "must be one of train, dev, test" in refused("ppl", broken, text_file, "--split", "valid")
    for content in ("3", "[]", "x", "[" * 100_000):
        (broken / "run.json").write_text(content)
        assert "put a copy of it back, or move it away" in refused("ppl", broken, text_file, "--split", "test")
    (broken / "run.json").write_text('{"dev_share": "a"}')
    assert "which are no seed and shares" in refused("ppl", broken, text_file, "--split", "test")
    (broken / "run.json").unlink()
    assert "which says what" in refused("ppl", broken, text_file, "--split", "test")


def test_ppl_refuses_bad_text_and_methods(model_dir, text_file, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    assert "is empty" in refused("ppl", model_dir, tmp_path / "empty.txt")
    assert "is not a UTF-8 text file" in refused("ppl", model_dir, tmp_path / "binary.txt")
    assert "does not exist" in refused("ppl", model_dir, tmp_path / "nothing.txt")
    assert "no field 'body'" in refused("ppl", model_dir, text_file, "--text-field", "body")
    assert "stage_digits" in refused("ppl", model_dir, text_file, "--method", "nested")
    nowhere = tmp_path / "nowhere" / "record.json"
    assert "does not exist; make it first" in refused("ppl", model_dir, text_file, "--output", nowhere)
    assert not nowhere.parent.exists()


def test_one_sequence_is_rendered_without_an_interval():
    score = {"method": "subtoken", "is_bound": True, "nats_per_token": math.log(8), "stderr": None, "num_samples": 1}
    score |= {"monte_carlo_stderr": None, "num_tokens": 3, "num_sequences": 1, "unigram_entropy": 1.0}
    score |= {"perplexity": 8.0, "perplexity_interval_95": None, "is_exact": False, "nats_per_token_interval_95": None}
    assert render_score(score).splitlines()[1:3] == [
        "subtoken         2.0794 nats/token (bound)",
        "perplexity       ≤ 8.00",
    ]


# ------------------------------------------------------------------------------------------------- entropy, card


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


def test_card_command_names_what_is_missing(model_dir, tmp_path):
    assert "name the record of the run with --record" in refused("card", model_dir)
    assert "is not a folder" in refused("card", tmp_path / "nowhere")
    record = tmp_path / "record.json"
    content = {"name": "train", "command": "x", "commit": "y", "results": {"config": {"vocab_size": 280}}}
    record.write_text(json.dumps(content))
    assert "the record has no results.evaluation" in refused("card", model_dir, "--record", record)
    assert not (model_dir / "README.md").exists()
