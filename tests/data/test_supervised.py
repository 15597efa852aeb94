"""Questions with answers: what is prompt, what is scored, what is dropped, which side of the split."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from prime_v2.data.packing import TrainingOrder, collate
from prime_v2.data.supervised import Supervision, read_examples, read_splits, render
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.tokenization.build import build_tokenizer

ROWS = [(f"What is {i} plus {j}?", f"{i} and {j} make {i + j}.\n#### {i + j}") for i in range(8) for j in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(
        train_bpe((f"{q}\n{a}" for q, a in ROWS), 280), special_tokens={"eos_token": "<|endoftext|>"}
    )


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    return Supervision(str(path), "question", "answer", "Q: {prompt}\nA: {answer}", None, 64, False, 0.2, 0.2, 0)


def test_a_row_is_prompt_answer_eos_and_padding_of_which_the_answer_and_its_eos_are_scored(options, tokenizer):
    part = read_splits(options, tokenizer)["train"]
    texts = {f"Q: {q}\nA:": f" {a}" for q, a in ROWS}
    eos = tokenizer.eos_token_id
    for i in range(len(part)):
        row = part[i]
        scored, real = row["labels"] != -100, row["attention_mask"].bool()
        assert torch.equal(row["labels"][scored], row["input_ids"][scored])
        answer = row["labels"][scored].tolist()
        assert answer[-1] == eos and eos not in answer[:-1]
        prompt = tokenizer.decode(row["input_ids"][real & ~scored])
        assert texts[prompt] == tokenizer.decode(answer[:-1])  # white space before the answer is the answer's
        assert (row["input_ids"][~real] == eos).all() and not real[int(real.sum()) :].any()
        assert not scored[~real].any()
    assert part.tokens == sum(int((part[i]["labels"] != -100).sum()) for i in range(len(part)))


def test_scored_padding_is_read_and_scored_up_to_the_end_of_the_row(options, tokenizer):
    hidden = read_splits(options, tokenizer)["dev"]
    part = read_splits(replace(options, score_padding=True), tokenizer)["dev"]
    for i in range(len(part)):
        start = int((hidden[i]["labels"] != -100).nonzero()[0])
        assert part[i]["attention_mask"].all()
        assert torch.equal(part[i]["labels"][start:], part[i]["input_ids"][start:])
        assert (part[i]["labels"][:start] == -100).all()


def test_windows_hold_each_example_once_without_hidden_padding(options, tokenizer):
    part = read_splits(options, tokenizer)["test"]
    found = [
        (ids[~mask].tolist(), ids[mask].tolist())
        for group, masks in part.windows()
        for ids, mask in zip(group, masks, strict=True)
    ]
    expected = []
    for i in range(len(part)):
        labels, real = part[i]["labels"], part[i]["attention_mask"].bool()
        scored = labels != -100
        expected.append((labels[scored].tolist(), part[i]["input_ids"][real & ~scored].tolist()))
    assert sorted(found) == sorted(expected)
    first = part.first(2)
    assert len(first) == 2 and torch.equal(first[1]["labels"], part[1]["labels"])
    assert first.bytes == round(part.bytes * first.tokens / part.tokens)


def test_over_long_examples_are_dropped_and_counted_never_cut(options, tokenizer):
    whole = read_splits(options, tokenizer)
    lengths = torch.cat([part.lengths for part in whole.values()])
    limit = int(lengths.median())
    cut = read_splits(replace(options, block_size=limit), tokenizer)
    assert sum(part.dropped for part in cut.values()) == int((lengths > limit).sum()) > 0
    assert sum(len(part) for part in cut.values()) == int((lengths <= limit).sum())
    kept = torch.cat([part.lengths for part in cut.values()])
    assert torch.equal(kept.sort().values, lengths[lengths <= limit].sort().values)


def test_every_example_is_on_one_side_and_equal_questions_on_the_same(options, tokenizer, tmp_path):
    sides = read_splits(options, tokenizer)
    assert sum(len(part) for part in sides.values()) == len(ROWS)
    other = tmp_path / "others.jsonl"  # the same questions, other answers, another order
    other.write_text("".join(json.dumps({"answer": "none", "question": q}) + "\n" for q, _ in reversed(ROWS)))
    again = read_splits(replace(options, data=str(other)), tokenizer)
    for split, part in sides.items():
        prompts = {tuple(ids[:n].tolist()) for ids, n in zip(part.ids, part.prompt_lengths, strict=True)}
        others = {tuple(i[:n].tolist()) for i, n in zip(again[split].ids, again[split].prompt_lengths, strict=True)}
        assert prompts == others


def test_samples_of_a_run_are_a_function_of_the_seed_and_collate(options, tokenizer):
    part = read_splits(options, tokenizer)["train"]
    first, second = (TrainingOrder(part, 60, 3) for _ in range(2))
    epoch = [first[i]["input_ids"].tolist() for i in range(len(part))]
    assert epoch == [second[i]["input_ids"].tolist() for i in range(len(part))]
    assert sorted(epoch) == sorted(part.ids.tolist()) and epoch != part.ids.tolist()
    batch = collate([first[0], first[1]], global_batch=2, seed=0)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "sample_number"}
    assert batch["labels"].shape == (2, 64)


def test_special_tokens_in_a_text_are_text(options, tokenizer, tmp_path):
    path = tmp_path / "special.jsonl"
    row = {"question": "What ends it?", "answer": "<|endoftext|>"}
    path.write_text("".join(json.dumps(row | {"question": f"{q} {row['question']}"}) + "\n" for q, _ in ROWS))
    part = read_splits(replace(options, data=str(path)), tokenizer)["train"]
    assert (part.ids[0, : part.lengths[0]] == tokenizer.eos_token_id).sum() == 1  # ours, at the end


@pytest.mark.parametrize(
    "template",
    ["{prompt}", "{answer}", "{answer} {prompt}", "{prompt} {answer} {answer}", "{prompt} {answer} {prompt}"],
)
def test_a_template_needs_the_prompt_before_one_answer(template):
    with pytest.raises(ValueError, match="must hold {prompt} before one {answer}; use e.g."):
        render(template, "a", "b")


def test_braces_in_texts_are_texts():
    assert render("{prompt}\n{answer}", "{answer} {0}", "{prompt}") == ("{answer} {0}", "\n{prompt}")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a"}', "line 1 has no field 'answer'; its fields are question"),
        ('{"question": "a", "answer": 3}', "line 1: the field 'answer' is int, not text"),
        ('{"question": "a", "answer": " "}', "example 1: the field 'answer' is empty; drop that row"),
        ('{"question": "a", "answer": ', "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object with the field 'question'"),
    ],
)
def test_bad_rows_are_named(options, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_examples(replace(options, data=str(path))))


def test_other_files_empty_splits_and_missing_eos_are_refused(options, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is no .jsonl file; give one with the fields question, answer"):
        list(read_examples(replace(options, data=str(tmp_path / "none.jsonl"))))
    with pytest.raises(ValueError, match=r"the \w+ split of sums.jsonl has no example .*use more examples or other"):
        read_splits(replace(options, max_documents=1), tokenizer)
    with pytest.raises(ValueError, match="are longer than --block_size 4"):
        read_splits(replace(options, block_size=4), tokenizer)
    base = PreTrainedTokenizerFast(tokenizer_object=train_bpe((q for q, _ in ROWS), 260))
    with pytest.raises(ValueError, match="has no EOS token to end answers with"):
        read_splits(options, base)
