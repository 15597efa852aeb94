"""Token blocks on disk, the order in which training reads them, and how a batch is put together.

Layout of a packed file PATH: the ids of all blocks, row by row, as little-endian uint16 (V <= 65,535) or uint32, with
no header; PATH.json beside it says what they are. The JSON is written last: without it the pair does not count.
"""

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from prime_v2.data.splits import Fingerprint
from prime_v2.loss_prime_v2 import check_batch
from prime_v2.output.atomic import written_whole
from prime_v2.random_prime_v2 import Stream, permutation, uniforms
from prime_v2.tokenization.plain_text import in_batches

EncodeBatch = Callable[[list[str]], list[list[int]]]
FindLoss = Callable[[list[str], list[list[int]]], str | None]  # of texts and their ids


class _Stream:
    """Documents as one stream of ids with EOS after each; keeps what `pack_blocks` reports about it."""

    def __init__(
        self,
        encode_batch: EncodeBatch,
        block_size: int,
        eos_token_id: int,
        vocab_size: int,
        find_loss: FindLoss | None = None,
    ):
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1 token, e.g. 512")
        if not 0 <= eos_token_id < vocab_size:
            raise ValueError(f"eos_token_id={eos_token_id} must be an id in [0, {vocab_size}), e.g. 0")
        self.encode_batch = encode_batch
        self.block_size = block_size
        self.eos_token_id = eos_token_id
        self.vocab_size = vocab_size
        self.find_loss = find_loss
        self.loss: str | None = None
        self.rest = np.empty(0, dtype=np.int64)

    def blocks(
        self, documents: Iterable[str], on_document: Callable[[str, int], None], skip: int = 0
    ) -> Iterator[np.ndarray]:
        """Full blocks, (n, block_size) int64 at a time; calls on_document(text, number of ids with EOS) for each.

        skip: so many ids of the first document are left out.
        """
        for texts in in_batches(documents):
            encoded = self.encode_batch(texts)
            if len(encoded) != len(texts):
                raise ValueError(f"encode_batch returned {len(encoded)} lists of ids for {len(texts)} documents")
            pieces = [self.rest]
            for text, ids in zip(texts, encoded, strict=True):
                pieces.append(np.asarray([*ids, self.eos_token_id], dtype=np.int64))
                on_document(text, len(pieces[-1]))
            stream = np.concatenate(pieces)
            if stream.min() < 0 or stream.max() >= self.vocab_size:
                raise ValueError(
                    f"encode_batch returned ids that span [{stream.min()}, {stream.max()}], outside "
                    f"[0, {self.vocab_size}); use vocab_size={stream.max() + 1} or the tokenizer that belongs to it"
                )
            if self.find_loss is not None and self.loss is None:
                self.loss = self.find_loss(texts, encoded)
            stream, skip = stream[skip:], 0
            kept = len(stream) // self.block_size * self.block_size
            self.rest = stream[kept:]
            if kept:
                yield stream[:kept].reshape(-1, self.block_size)


class _KeptBytes:
    """Bytes of text that the tokens of full blocks cover, without holding more than one block's documents."""

    def __init__(self) -> None:
        self.pending: deque[tuple[int, int]] = deque()  # (ids with EOS, bytes) of documents not wholly kept
        self.whole_ids = 0
        self.whole_bytes = 0
        self.documents = 0

    def add(self, text: str, num_ids: int) -> None:
        self.pending.append((num_ids, len(text.encode())))
        self.documents += 1

    def settle(self, kept_ids: int) -> int:
        """The bytes of the first kept_ids ids; a document kept in part counts in proportion to its ids."""
        while self.pending and self.whole_ids + self.pending[0][0] <= kept_ids:
            num_ids, num_bytes = self.pending.popleft()
            self.whole_ids += num_ids
            self.whole_bytes += num_bytes
        if not self.pending:
            return self.whole_bytes
        num_ids, num_bytes = self.pending[0]
        return self.whole_bytes + round(num_bytes * (kept_ids - self.whole_ids) / num_ids)


def pack_blocks(
    documents: Iterable[str],
    encode_batch: EncodeBatch,
    *,
    block_size: int,
    eos_token_id: int,
    vocab_size: int,
    path: str | Path,
    find_loss: FindLoss | None = None,
) -> "PackedBlocks":
    """Tokenise documents, put EOS after each, cut the stream into blocks and write them to `path` and `path`.json.

    encode_batch: list of texts to list of lists of ids in [0, vocab_size), without special tokens added; text that
    happens to spell a special token must come out as plain text. What does not fill a last block is dropped, and
    counted in the JSON. An earlier pair at `path` is replaced only once the new one is complete; a failure leaves it.
    find_loss: of texts and their ids, an example of what the ids do not hold; the first is the JSON's tokenizer_loss.
    Raises ValueError for ids out of range, no text, and text that does not fill one block.
    """
    path = Path(path)
    dtype = np.dtype("<u2" if vocab_size <= 65535 else "<u4")
    stream = _Stream(encode_batch, block_size, eos_token_id, vocab_size, find_loss)
    fingerprint, kept_bytes, num_blocks = Fingerprint(), _KeptBytes(), 0

    def on_document(text: str, num_ids: int) -> None:
        fingerprint.add(text)
        kept_bytes.add(text, num_ids)

    # Bad input shows before anything is written.
    batches = stream.blocks(documents, on_document)
    first = next(batches, None)
    if first is None:
        _refuse_short_text(kept_bytes.documents, len(stream.rest), block_size)

    with written_whole(_info_path(path)) as json_file, written_whole(path) as file:
        for blocks in itertools.chain([first], batches):
            file.write(blocks.astype(dtype).tobytes())
            num_blocks += len(blocks)
            kept_bytes.settle(num_blocks * block_size)
        info = {
            "dtype": dtype.name,
            "block_size": block_size,
            "blocks": num_blocks,
            "tokens": num_blocks * block_size,
            "dropped_tokens": len(stream.rest),
            "bytes": kept_bytes.settle(num_blocks * block_size),
            "documents": kept_bytes.documents,
            "fingerprint": fingerprint.hexdigest(),
            "vocab_size": vocab_size,
            "eos_token_id": eos_token_id,
            **({} if stream.loss is None else {"tokenizer_loss": stream.loss}),
        }
        json_file.write(json.dumps(info, indent=1).encode())
        for each in (file, json_file):
            each.flush()  # a full disk is found before an earlier pair goes
        # The file is moved before its JSON: until then there must be none, or it would describe the other file.
        _info_path(path).unlink(missing_ok=True)
    return PackedBlocks(path)


def _refuse_short_text(num_documents: int, num_tokens: int, block_size: int) -> NoReturn:
    if num_documents == 0:
        raise ValueError("there is no document to pack; give a source with at least one block of text")
    raise ValueError(
        f"the text has {num_tokens} tokens, fewer than one block of block_size={block_size}; "
        f"use block_size={num_tokens} or less, or more text"
    )


def _info_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class PackedBlocks:
    """The blocks that `pack_blocks` wrote, read from disk on demand: `len(blocks)`, `blocks[i]`.

    `blocks[i]` is an int64 array (block_size,). Attributes, from the JSON: block_size, vocab_size, eos_token_id,
    tokens (in all blocks), bytes (of text that the blocks cover), documents, fingerprint,
    tokenizer_loss (an example of what the tokens do not hold of the text, or None); `info` is the JSON itself.
    Raises ValueError when the file or its JSON is missing or damaged, or their sizes disagree.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.info: dict = json.loads(_info_path(self.path).read_text(encoding="utf-8"))
            self.block_size: int = self.info["block_size"]
            self.vocab_size: int = self.info["vocab_size"]
            self.eos_token_id: int = self.info["eos_token_id"]
            self.tokens: int = self.info["tokens"]
            self.bytes: int = self.info["bytes"]
            self.documents: int = self.info["documents"]
            self.fingerprint: str = self.info["fingerprint"]
            self.tokenizer_loss: str | None = self.info.get("tokenizer_loss")
            shape = (self.info["blocks"], self.block_size)
            dtype = np.dtype(self.info["dtype"]).newbyteorder("<")
            found = self.path.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} does not exist; pack the text again") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{_info_path(self.path)} does not describe packed blocks; pack the text again") from None
        if found != self.tokens * dtype.itemsize:
            raise ValueError(
                f"{self.path} has {found} bytes instead of {self.tokens * dtype.itemsize}; pack the text again"
            )
        self._ids = np.memmap(self.path, dtype=dtype, mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._ids[index].astype(np.int64)

    def first(self, count: int) -> Tensor:
        """The first `count` blocks, or all of fewer: (n, block_size) int64."""
        return torch.from_numpy(self._ids[:count].astype(np.int64))

    @property
    def ids(self) -> np.ndarray:
        """The ids of all blocks one after another, (tokens,), unsigned, read from disk on demand."""
        return self._ids.reshape(-1)

    def __reduce__(self):
        # A memmap would pickle as a copy of the data; worker processes open the file themselves.
        return PackedBlocks, (self.path,)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, EOS tokens included: nats per token / (this * log 2) are bits per byte."""
        return self.bytes / self.tokens


def _sample(block: Any, sample_number: int) -> dict[str, Tensor]:
    if isinstance(block, dict):  # an example with labels of its own, see `supervised`
        return {**block, "sample_number": torch.tensor(sample_number)}
    input_ids = torch.from_numpy(block)
    return {"input_ids": input_ids, "labels": input_ids, "sample_number": torch.tensor(sample_number)}


class TrainingOrder:
    """Map-style data set over the samples of a run, in their order; each epoch visits every block once.

    Item n is sample n: {"input_ids": (block_size,) int64, "labels": the same, "sample_number": () int64, n}, from
    block permutation_e[n % len(blocks)] with e = n // len(blocks). permutation_e is a pure function of the seed, e and
    the number of blocks, so that workers, ranks and restarts agree. Read it in sequence, without a shuffling sampler.
    blocks: anything with `len` and `[i] -> (block_size,) int64 array`, e.g. `PackedBlocks`, or `[i] -> dict` of what a
    batch takes, e.g. `Examples`.
    Raises ValueError for no blocks.
    """

    def __init__(self, blocks: Any, num_samples: int, seed: int):
        if len(blocks) == 0:
            raise ValueError("there are no blocks to train on; pack at least one")
        self.blocks = blocks
        self.num_samples = num_samples
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        epoch, position = divmod(number, len(self.blocks))
        return _sample(self.blocks[int(self._permutation(epoch)[position])], number)

    def blocks_read(self, most: int) -> Tensor:
        """The blocks that the run reads, each once, in the order of the first reading: (n, block_size), n <= most."""
        count = min(self.num_samples, len(self.blocks), most)
        return torch.stack([torch.from_numpy(self.blocks[int(place)]) for place in self._permutation(0)[:count]])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # Two are kept, since a batch may straddle two epochs.
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = permutation(len(self.blocks), Stream.BLOCK_ORDER, self.seed, epoch)
        return self._epochs[epoch]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_epochs": {}}


class StreamedBlocks(IterableDataset):
    """Blocks packed on the fly from a stream that does not fit on disk: the dicts of `TrainingOrder`, in the order of
    the documents, with sample_number 0, 1, ..., num_samples-1.

    Each sample also says where its block starts: position, (4,) int64, its own number, the pass, the document of that
    pass, and the id of that document.

    documents: called with the number of the pass (0, 1, ...) whenever the stream is at its end; returns the documents
    of that pass, the same at each call. A block may reach from one pass into the next. Holds one batch of 256
    documents. `resume` says where to begin instead of at sample 0. Other arguments as for `pack_blocks`.
    Raises ValueError, when iterated, for ids out of range, for a pass without documents, and in more than one
    DataLoader worker (each would read the whole stream).
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[str]],
        encode_batch: EncodeBatch,
        *,
        block_size: int,
        eos_token_id: int,
        vocab_size: int,
        num_samples: int,
    ):
        self._stream_arguments = (encode_batch, block_size, eos_token_id, vocab_size)
        _Stream(*self._stream_arguments)  # refuses bad arguments now
        self.documents = documents
        self.num_samples = num_samples
        self.resume(0, (0, 0, 0, 0))

    def resume(self, start: int, position: tuple[int, int, int, int]) -> None:
        """Begin with sample `start`. position: that of it or of a sample before it; the documents before that are read
        but not tokenised."""
        if not 0 <= start <= self.num_samples:
            raise ValueError(f"start={start} must lie in [0, num_samples={self.num_samples}], e.g. 0")
        if not 0 <= position[0] <= start:
            raise ValueError(f"position {tuple(position)} is not before sample {start}; use (0, 0, 0, 0)")
        self.start, self.position = start, position

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a stream cannot be shared by {worker.num_workers} workers; use dataloader_num_workers=1"
            )
        blocks = itertools.islice(self._blocks_from(*self.position), self.num_samples - self.position[0])
        for position, block in blocks:
            if position[0] >= self.start:
                yield _sample(block, position[0]) | {"position": torch.tensor(position)}

    def _blocks_from(
        self, number: int, first_pass: int, first_document: int, skip: int
    ) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
        """Blocks number, number + 1, ... with their positions; block `number` starts at the given one."""
        stream = _Stream(*self._stream_arguments)
        begun: deque[tuple[int, int, int]] = deque()  # (first id, pass, document) from the next block's document on
        place = [first_pass, first_document]  # pass and document that is encoded next
        next_id, block_id = -skip, 0  # counted from the start of block `number`

        def on_document(_text: str, num_ids: int) -> None:
            nonlocal next_id
            begun.append((next_id, place[0], place[1]))
            place[1] += 1
            next_id += num_ids

        while True:
            first = place[1]
            documents = itertools.islice(self.documents(place[0]), first, None)
            for blocks in stream.blocks(documents, on_document, skip):
                for block in blocks:
                    while len(begun) > 1 and begun[1][0] <= block_id:
                        begun.popleft()
                    first_id, number_of_pass, document = begun[0]
                    yield (number, number_of_pass, document, block_id - first_id), block.copy()
                    number, block_id = number + 1, block_id + stream.block_size
            if place[1] == first:
                raise ValueError(
                    f"pass {place[0]} over the stream has no documents{f' from {first} on' if first else ''}; give a "
                    f"source that can be read again"
                )
            place[:], skip = [place[0] + 1, 0], 0


def collate(
    samples: list[dict[str, Tensor]], *, global_batch: int, seed: int, short_share: float = 0.0, config: Any = None
) -> dict[str, Tensor]:
    """Stack samples: {"input_ids": (B, L), "labels": (B, L), "sample_number": (B,)}, all int64.

    With probability short_share per optimiser step, the batch is cut to its first n tokens, n uniform in 1..L. Whether
    and where is a pure function of (seed, step), step = sample_number // global_batch, so that all ranks and
    micro-batches of a step agree; global_batch is the number of samples of a step, over all of them.
    config: of the model that is trained, which then need not look at ids, labels and masks on an accelerator.
    Raises ValueError for a short_share outside [0, 1], a global_batch < 1, samples of several steps when cutting, and
    with a config for what that model does not take (`check_batch`).
    """
    if not 0 <= short_share <= 1:
        raise ValueError(f"short_share={short_share} must be a probability in [0, 1], e.g. 0.01")
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch} must be at least 1 sample per step")
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    if short_share > 0:
        steps = (batch["sample_number"] // global_batch).unique()
        if len(steps) > 1:
            raise ValueError(
                f"one batch holds samples of steps {steps.tolist()}; use a batch size that divides "
                f"global_batch={global_batch}"
            )
        length = short_length(batch["input_ids"].shape[1], seed, int(steps[0]), short_share)
        batch |= {name: batch[name][:, :length].contiguous() for name in ("input_ids", "labels")}
    if config is not None:
        check_batch(config, batch["input_ids"], batch["labels"], batch.get("attention_mask"))
    return batch


def short_length(block_size: int, seed: int, step: int, short_share: float) -> int:
    """Tokens per sample at a step, in 1..block_size: block_size with probability 1 - short_share, else uniform."""
    choice, length = (float(uniforms(Stream.SHORT_LENGTH, seed, step, draw)) for draw in (0, 1))
    return block_size if choice >= short_share else 1 + int(length * block_size)
