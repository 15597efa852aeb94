"""PrimeV2Tokenizer against the tokenizer it wraps, in this process, reloaded and in a process without the package."""

import ast
import copy
import hashlib
import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from small_tokenizers import CHAT_TEMPLATE, small_base
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prime_v2.code_table_prime_v2 import PrimeV2CodeTable, build_code_table
from prime_v2.configuration_prime_v2 import PrimeV2Config
from prime_v2.tokenization import PrimeV2Tokenizer, build_tokenizer, tokenization_prime_v2

ROOT = Path(__file__).parents[2]
REAL_TOKENIZERS = ROOT.parent / "shared" / "data" / "tokenizers"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "  Two  spaces,\n\ta tab and naïve café — 你好 🙂",
    "<|endoftext|>an end first, and <|extra|> inside; 3.14159 isn't it?",
    "x",
]
CHAT = [{"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "The quick brown one."}]
# Every way to call a tokenizer that must give what the wrapped one gives.
CALLS = {
    "ids": lambda t: [t(text).data for text in TEXTS],
    "batch": lambda t: t(TEXTS).data,
    "padding": lambda t: t(TEXTS, padding=True).data,
    "padding to a multiple": lambda t: t(TEXTS, padding="max_length", max_length=40, pad_to_multiple_of=8).data,
    "padding later": lambda t: t.pad({"input_ids": [[1, 2, 3], [4]]}, padding=True).data,
    "truncation": lambda t: t(TEXTS, truncation=True, max_length=5).data,
    "windows": lambda t: t(TEXTS, truncation=True, max_length=8, stride=2, return_overflowing_tokens=True).data,
    "pair": lambda t: t(TEXTS[0], TEXTS[2], truncation="longest_first", max_length=20).data,
    "words": lambda t: t([TEXTS[0].split()], is_split_into_words=True).data,
    "tensors": lambda t: {k: v.tolist() for k, v in t(TEXTS, padding=True, return_tensors="pt").items()},
    "offsets": lambda t: t(TEXTS, return_offsets_mapping=True, return_special_tokens_mask=True).data,
    "plain": lambda t: [t.encode(text, add_special_tokens=False) for text in TEXTS],
    "tokens": lambda t: [t.tokenize(text) for text in TEXTS],
    "as text": lambda t: t(TEXTS, split_special_tokens=True).data,
    "decode": lambda t: [t.decode(t(text).input_ids) for text in TEXTS],
    "decode batch": lambda t: t.batch_decode(t(TEXTS).input_ids, skip_special_tokens=True),
    "chat": lambda t: t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
    "chat ids": lambda t: t.apply_chat_template(CHAT).data,
    "special tokens": lambda t: {k: v for k, v in t.special_tokens_map.items() if k != "mask_token"},
    "ids of special tokens": lambda t: (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id),
    "sides": lambda t: (t.padding_side, t.truncation_side, t.model_max_length),
    "vocabulary": lambda t: {token: i for token, i in t.get_vocab().items() if token != "<|mask|>"},
}


def load_base(name: str, bpe: Tokenizer) -> PreTrainedTokenizerFast:
    if name == "small":
        return small_base(bpe)
    folder = REAL_TOKENIZERS / name
    if not folder.is_dir():
        pytest.skip(f"the files of the {name} tokenizer are not beside the repository")
    real = AutoTokenizer.from_pretrained(folder)
    real.pad_token, real.chat_template = real.eos_token, CHAT_TEMPLATE
    return real


def get_again(tokenizer: PrimeV2Tokenizer, way: str, folder: Path) -> PrimeV2Tokenizer:
    """The tokenizer after one of the ways to store, load or copy it."""
    tokenizer.save_pretrained(folder / "once")
    match way:
        case "built":
            return tokenizer
        case "by class":
            return PrimeV2Tokenizer.from_pretrained(folder / "once")
        case "by AutoTokenizer":
            return AutoTokenizer.from_pretrained(folder / "once", trust_remote_code=True)
        case "saved twice":
            AutoTokenizer.from_pretrained(folder / "once", trust_remote_code=True).save_pretrained(folder / "twice")
            return AutoTokenizer.from_pretrained(folder / "twice", trust_remote_code=True)
        case "pickled":
            return pickle.loads(pickle.dumps(tokenizer))
        case "copied":
            return copy.deepcopy(tokenizer)


WAYS = ["built", "by class", "by AutoTokenizer", "saved twice", "pickled", "copied"]
CASES = [("small", way) for way in WAYS] + [(name, way) for name in ("gpt2", "llama") for way in WAYS[:4:2]]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, bpe, tmp_path_factory) -> tuple[PreTrainedTokenizerFast, PrimeV2Tokenizer]:
    """A base tokenizer and the PrimeV2Tokenizer over it, got in one of the ways."""
    name, way = request.param
    base = load_base(name, bpe)
    return base, get_again(build_tokenizer(base, shuffle_seed=5), way, tmp_path_factory.mktemp("saved"))


def test_every_call_gives_what_the_wrapped_tokenizer_gives(case):
    base, tokenizer = case
    for name, call in CALLS.items():
        assert call(tokenizer) == call(base), name


def test_the_mask_token_gets_the_id_after_the_vocabulary(case):
    base, tokenizer = case
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.mask_token_id == len(base) == len(tokenizer.code_table)
    assert len(tokenizer) == len(base) + 1
    assert tokenizer("a<|mask|>b", add_special_tokens=False).input_ids.count(len(base)) == 1


def test_the_table_is_the_one_of_the_model_configuration(case):
    _, tokenizer = case
    config = PrimeV2Config(**tokenizer.code_table_parameters)
    assert config.shuffle_seed == 5
    assert tokenizer.code_table.dtype == np.int64
    assert torch.equal(torch.as_tensor(tokenizer.code_table), PrimeV2CodeTable(config).build()[:-1])


def test_subtokens_round_trip_with_the_mask_token_fully_masked(case):
    _, tokenizer = case
    base = tokenizer.code_table_parameters["base"]
    ids = np.arange(len(tokenizer))
    digits = tokenizer.encode_subtokens(ids)
    assert np.array_equal(digits[:-1], tokenizer.code_table)
    assert (digits[-1] == base).all()
    assert np.array_equal(tokenizer.decode_subtokens(digits), ids)


CHILD = """
import json, pickle, sys
from pathlib import Path
from transformers import AutoTokenizer
folder, pickled, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
alone = not [name for name in sys.modules if name.startswith("prime_v2")]
found = []
for each in (tokenizer, pickle.loads(Path(pickled).read_bytes())):
    ids = each(text).input_ids
    digits = each.encode_subtokens(ids)
    found.append([ids, digits.tolist(), each.decode(ids), each.decode_subtokens(digits).tolist()])
print(json.dumps([alone, *found]))
"""


def test_a_new_process_loads_the_folder_and_the_pickle_alike(small, tmp_path):
    """The folder is loaded through its own copy of the code; only the pickle needs the package."""
    small.save_pretrained(tmp_path / "saved")
    (tmp_path / "pickled").write_bytes(pickle.dumps(small))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "saved"), str(tmp_path / "pickled"), TEXTS[3]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = small(TEXTS[3]).input_ids
    expected = [ids, small.encode_subtokens(ids).tolist(), small.decode(ids), ids]
    assert json.loads(done.stdout) == [True, expected, expected]


def test_a_data_set_maps_over_two_processes(small):
    rows = datasets.Dataset.from_dict({"text": TEXTS * 4})
    mapped = rows.map(
        lambda row: {"ids": (ids := small(row["text"]).input_ids), "digits": small.encode_subtokens(ids)}, num_proc=2
    )
    assert mapped["ids"][:] == [small(text).input_ids for text in TEXTS * 4]
    assert mapped["digits"][2] == small.encode_subtokens(mapped["ids"][2]).tolist()


def test_a_saved_folder_names_and_holds_the_code_that_loads_it(small, tmp_path):
    files = small.save_pretrained(tmp_path)
    assert {Path(file).name for file in files} >= {"tokenizer.json", "tokenizer_config.json", "code_table.json"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_prime_v2.PrimeV2Tokenizer", None]}
    assert config["tokenizer_class"] == "PrimeV2Tokenizer"
    source = Path(tokenization_prime_v2.__file__)
    assert (tmp_path / source.name).read_bytes() == source.read_bytes()
    table = json.loads((tmp_path / "code_table.json").read_text(encoding="utf-8"))
    codes = struct.pack(f"<{small.code_table.size}q", *small.code_table.flat)
    vocabulary = ",".join(json.dumps(small.convert_ids_to_tokens(i)) for i in range(len(small)))
    assert table.pop("codes_sha256") == hashlib.sha256(codes).hexdigest()
    assert table.pop("vocabulary_sha256") == hashlib.sha256(f"[{vocabulary}]".encode()).hexdigest()
    assert table == {**small.code_table_parameters, "codes": small.code_table.tolist()}


def test_the_hub_file_imports_nothing_of_the_package():
    tree = ast.parse(Path(tokenization_prime_v2.__file__).read_text(encoding="utf-8"))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    standard = {"collections.abc", "hashlib", "json", "os", "reprlib", "typing"}
    assert imports == {*standard, "numpy", "tokenizers", "transformers"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, prime_v2.tokenization as t; print(*dir(t), *({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build_tokenizer" in done.stdout and "torch" not in done.stdout and "transformers" not in done.stdout


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import prime_v2.tokenization

    with pytest.raises(AttributeError, match="has no attribute 'bild_tokenizer'; it has PrimeV2Tokenizer, build_"):
        _ = prime_v2.tokenization.bild_tokenizer


@pytest.mark.parametrize("ids", [3, [3, 4], [[3, 4], [5, 400]], []], ids=str)
def test_numbers_lists_arrays_and_tensors_are_encoded(small, ids):
    expected = small.encode_subtokens(np.array(ids, dtype=np.int64))
    assert expected.shape == (*np.shape(ids), small.code_table.shape[1])
    assert np.array_equal(small.encode_subtokens(ids), expected)
    tensor = torch.tensor(ids, dtype=torch.int32)
    digits = small.encode_subtokens(tensor)
    assert digits.dtype == torch.int64 and digits.tolist() == expected.tolist()
    # In bytes: the ids that come back do not fit in the type of the digits.
    back = small.decode_subtokens(digits.to(torch.uint8))
    assert back.dtype == torch.int64 and back.tolist() == ids
    assert np.array_equal(small.decode_subtokens(expected.tolist()) if ids != [] else [], ids)


@pytest.mark.parametrize(
    "ids, message",
    [
        (
            [-1, 5],
            r"token ids span \[-1, 5\], but this tokenizer's ids are in \[0, 401\], the mask token 401 included",
        ),
        ([402], r"token ids span \[402, 402\], but this tokenizer's ids are in \[0, 401\]"),
        ([[1, 2], [3]], "token ids are nested lists of different lengths; pad them to one length"),
        ([1.5], "token ids must be integers, not float64"),
        (torch.tensor([True]), "token ids must be integers, not bool"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(small, ids, message):
    with pytest.raises(ValueError, match=message):
        small.encode_subtokens(ids)


def test_digits_that_are_no_token_are_refused(small):
    unused = next(
        code
        for code in (np.arange(512)[:, None] >> np.arange(8, -1, -1)) & 1
        if not (small.code_table == code).all(1).any()
    )
    partly = small.code_table[7].copy()
    partly[3] = 2
    for digits, message in [
        (unused, f"{re.escape(str(unused.tolist()))} are a code that no token uses; only the 401 codes"),
        (partly, f"{re.escape(str(partly.tolist()))} are partly masked; only the 401 codes of the table"),
        (np.full(9, 3), r"span \[3, 3\], but a digit of base 2 is in \[0, 1\], or 2 when masked"),
        (np.full(9, -1), r"span \[-1, -1\], but a digit of base 2"),
        (np.zeros(8, int), r"shape \(8,\) must have num_subtokens=9 as last axis"),
        (np.array(1), r"shape \(\) must have num_subtokens=9 as last axis"),
    ]:
        for given in (digits, digits.tolist(), torch.as_tensor(digits)):
            with pytest.raises(ValueError, match=message):
                small.decode_subtokens(given)


def test_a_tokenizers_object_is_wrapped_with_its_special_tokens(bpe):
    tokenizer = build_tokenizer(bpe, base=3, special_tokens={"eos_token": "<|endoftext|>"}, model_max_length=64)
    assert tokenizer(TEXTS[0]).input_ids == bpe.encode(TEXTS[0]).ids
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == bpe.token_to_id("<|endoftext|>")
    assert tokenizer.mask_token_id == bpe.get_vocab_size() and tokenizer.model_max_length == 64
    assert tokenizer.code_table.shape == (400, 6) and tokenizer.code_table.max() == 2
    assert bpe.token_to_id("<|mask|>") is None  # the object that was passed is unchanged


def test_new_special_tokens_are_part_of_the_vocabulary(bpe):
    new = {"bos_token": "<s>", "sep_token": "<sep>"}
    for tokenizer in (build_tokenizer(bpe, special_tokens=new), build_tokenizer(bpe, **new)):
        assert (tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) == (400, 401, 402)
        assert len(tokenizer.code_table) == 402


def test_a_gap_in_the_ids_counts_towards_the_vocabulary(bpe):
    content = json.loads(bpe.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 410, "content": "<|far|>"})
    gappy = Tokenizer.from_str(json.dumps(content))
    tokenizer = build_tokenizer(gappy)
    assert tokenizer.mask_token_id == max(gappy.get_vocab().values()) + 1 == len(tokenizer.code_table)


def test_a_folder_is_wrapped_by_its_path(bpe, tmp_path):
    small_base(bpe).save_pretrained(tmp_path)
    assert build_tokenizer(tmp_path)(TEXTS[3]).input_ids == small_base(bpe)(TEXTS[3]).input_ids


def test_an_earlier_truncation_and_padding_are_not_wrapped(bpe):
    base = small_base(bpe)
    base(TEXTS, truncation=True, max_length=2, padding="max_length")
    tokenizer = build_tokenizer(base)
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


def test_the_mask_token_of_the_wrapped_tokenizer_stays_an_ordinary_token(bpe):
    base = small_base(bpe)
    base.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer = build_tokenizer(base)
    assert tokenizer("[MASK]").input_ids == base("[MASK]").input_ids == [401]
    assert tokenizer.mask_token_id == 402


@pytest.mark.parametrize(
    "options, base, num_subtokens",
    [({}, 2, 9), ({"base": 5}, 5, 4), ({"num_subtokens": 1}, 401, 1), ({"num_subtokens": 3}, 8, 3)],
)
def test_digits_default_to_as_few_as_fit(bpe, options, base, num_subtokens):
    parameters = build_tokenizer(small_base(bpe), **options).code_table_parameters
    assert (parameters["base"], parameters["num_subtokens"]) == (base, num_subtokens)


def test_the_shuffle_options_reach_the_table(bpe):
    options = {"shuffle_seed": 3, "shuffle_ratio": 0.25, "shuffle_domain": "vocab"}
    tokenizer = build_tokenizer(bpe, base=3, num_subtokens=7, **options)
    assert np.array_equal(tokenizer.code_table, build_code_table(400, 3, 7, 3, 0.25, "vocab"))
    assert {name: tokenizer.code_table_parameters[name] for name in options} == options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base": 2, "num_subtokens": 4}, "vocab_size=400 does not fit in num_subtokens=4 .* use num_subtokens=9"),
        ({"base": 1}, "base=1, num_subtokens=9: these must be at least 1, 2 and 1"),
        ({"num_subtokens": 0}, "num_subtokens=0: these must be at least 1, 2 and 1"),
        ({"base": 2.0}, "base=2.0 must be an integer"),
        ({"shuffle_seed": True}, "shuffle_seed=True must be an integer"),
        ({"shuffle_ratio": 2}, r"shuffle_ratio=2 is outside \[0, 1\]"),
        ({"mask_token": "in"}, "mask_token='in' is already the token .*; use one outside its vocabulary"),
        ({"num_subtoken": 5}, "build_tokenizer has no argument num_subtoken=5; did you mean num_subtokens"),
        ({"shuffle_sed": 5}, "build_tokenizer has no argument shuffle_sed=5; did you mean shuffle_seed"),
        ({"model_max_lenght": 5}, "build_tokenizer has no argument model_max_lenght=5; did you mean model_max_length"),
        ({"colour": "red"}, "build_tokenizer has no argument colour='red'; leave it out"),
        ({"special_tokens": {"end": "x"}}, "special_tokens has 'end', which is not one of bos_token, "),
    ],
)
def test_impossible_options_are_refused(bpe, options, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(bpe, **options)


def test_what_is_no_fast_tokenizer_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from '.*'.*; use a Hub name or a folder"):
        build_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="dict is not a fast tokenizer; use one that has a tokenizer.json"):
        build_tokenizer({})
    with pytest.raises(ValueError, match="is a PrimeV2Tokenizer already; pass the one that it was built from"):
        build_tokenizer(small)


def test_tokens_without_a_code_cannot_be_added(small):
    with pytest.raises(ValueError, match="cannot add '<new>': the code table holds the 401 tokens it was built for"):
        small.add_special_tokens({"sep_token": "<new>"})
    assert small.sep_token is None  # refused before the name was assigned, so that a saved folder still loads
    with pytest.raises(ValueError, match="cannot add '<new>'"):
        small.add_tokens("<new>")
    assert small.add_tokens(["<|pad|>"], special_tokens=True) == 0


NEW_TOKEN = "cannot add '<new>': the code table holds the"
OTHER_MASK = "cannot take the place of '<|mask|>', whose id .* means that all digits are masked"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pad_token", "<new>", NEW_TOKEN),
        ("pad_token", AddedToken("<new>"), NEW_TOKEN),
        ("eos_token", "<new>", NEW_TOKEN),
        ("extra_special_tokens", ["in", "<new>"], NEW_TOKEN),
        ("mask_token", "in", OTHER_MASK),
        ("mask_token", "<new>", OTHER_MASK),
        ("mask_token", None, OTHER_MASK),
        ("mask_token_id", 3, OTHER_MASK),
        ("pad_token_id", 10**6, "pad_token_id=1000000 is no token id"),
        ("pad_token_id", -1, "pad_token_id=-1 is no token id"),
        ("pad_token_id", "3", "pad_token_id='3' is no token id"),
    ],
    ids=str,
)
def test_special_tokens_that_are_set_later_follow_the_rules_of_adding_them(small, name, value, message):
    before = {**small.special_tokens_map}
    with pytest.raises(ValueError, match=message):
        setattr(small, name, value)
    if not name.endswith("_id"):
        with pytest.raises(ValueError, match=message):
            small.add_special_tokens({"bos_token": "a", name: value})
    assert small.special_tokens_map == before and len(small) == len(small.code_table) + 1


def test_special_tokens_that_there_are_can_be_set_later(small):
    kept = small.pad_token
    try:
        small.pad_token = "a"
        assert small.pad_token_id == small.convert_tokens_to_ids("a")
        small.pad_token_id = np.int64(2)
        assert small.pad_token == small.convert_ids_to_tokens(2)
        small.mask_token = AddedToken("<|mask|>")
        small.sep_token = None
    finally:
        small.pad_token = kept
