"""Decisions over the whole data set: which rows are duplicates, which split a prompt belongs to, which rows are used.

They need nothing but 64-bit hashes of each row, so the driver makes them for millions of rows in a few numpy calls;
the rows themselves stay where they are. Two different rows share a hash with probability below 3e-6 in ten million
rows; the later one would then be counted as a duplicate.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from raylign.data.schema import content_key
from raylign.types import PreferencePair, Split

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
UNNAMED = -1  # code of a row that names no split; other codes index SPLITS

DUPLICATE_ROW = "duplicate_row"
DUPLICATE_ID = "duplicate_id"

# Verdicts of one row; those below SAMPLED_OUT index SPLITS.
_SAMPLED_OUT, _DUPLICATE_ROW, _DUPLICATE_ID = 3, 4, 5


def prompt_key(pair: PreferencePair) -> str:
    """Sixteen hex digits of the first user turn, in lower case and with single blanks.

    Rows about one question share the key, however the conversation went on, so that no question is both trained on
    and reported on.
    """
    first = next(message.content for message in pair.prompt if message.role == "user")
    return _digest(" ".join(first.casefold().split()))


def assign_split(key: str | int, *, valid_fraction: float, test_fraction: float, seed: int) -> Split:
    """Split of a prompt key, from its hash alone.

    Args:
        key: a prompt key, as text or as the integer it spells.
        valid_fraction: share of keys in "valid".
        test_fraction: share of keys in "test".
        seed: another seed gives another split.
    """
    keys = np.array([int(key, 16) if isinstance(key, str) else key], np.uint64)
    return SPLITS[int(_hashed_splits(keys, valid_fraction, np.array([test_fraction]), seed)[0])]


@dataclass(frozen=True, slots=True)
class RowHashes:
    """What the driver knows of N valid rows, in data order.

    Attributes:
        row: (N,) uint64, hash of the row id.
        content: (N,) uint64, hash of prompt, chosen and rejected.
        mirrored: (N,) uint64, the content hash that the row would have with its answers swapped.
        prompt: (N,) uint64, the prompt key.
        named: (N,) int8, index into SPLITS of the split that the row names, or UNNAMED.
    """

    row: np.ndarray
    content: np.ndarray
    mirrored: np.ndarray
    prompt: np.ndarray
    named: np.ndarray


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What becomes of N valid rows.

    Attributes:
        codes: (N,) uint8; read with `outcome`.
        num_sampled_out: rows left out by `max_pairs`.
        num_contradictions: pairs of used rows that prefer opposite answers to one prompt; both rows are kept.
    """

    codes: np.ndarray
    num_sampled_out: int
    num_contradictions: int


def outcome(code: int) -> tuple[Split | None, str | None]:
    """Split of a used row, or the reason why it is quarantined; neither for a row left out by `max_pairs`."""
    if code < _SAMPLED_OUT:
        return SPLITS[code], None
    return None, {_DUPLICATE_ROW: DUPLICATE_ROW, _DUPLICATE_ID: DUPLICATE_ID}.get(int(code))


def decide(
    hashes: RowHashes, *, valid_fraction: float, test_fraction: float, max_pairs: int | None, seed: int
) -> Verdicts:
    """Duplicates, sample and splits of the whole data set.

    Of rows with equal content or, among those left, equal id, the first is kept. All rows of one prompt key get one
    split: if they name several, test wins over valid and valid over train, so that nothing reported was trained on.
    Keys that name no split go by hash. Keys that name "train" do too, because most data sets know no validation
    split, but never to a split that the data names itself.

    Args:
        hashes: N rows.
        valid_fraction: share of prompt keys held out to choose checkpoints.
        test_fraction: share of prompt keys held out for reports.
        max_pairs: use at most so many rows, those with the smallest hash of id and seed; None uses all.
        seed: of the split and of the sample.
    """
    num_rows = len(hashes.content)
    codes = np.zeros(num_rows, np.uint8)
    is_repeated = ~_is_first(hashes.content)
    codes[is_repeated] = _DUPLICATE_ROW
    left = np.flatnonzero(~is_repeated)
    codes[left[~_is_first(hashes.row[left])]] = _DUPLICATE_ID
    left = np.flatnonzero(codes == 0)
    num_sampled_out = 0
    if max_pairs is not None and len(left) > max_pairs:
        order = np.argsort(_mix(hashes.row[left], seed + 1), kind="stable")
        codes[left[order[max_pairs:]]] = _SAMPLED_OUT
        num_sampled_out = len(left) - max_pairs
        left = np.flatnonzero(codes == 0)
    codes[left] = _splits(hashes.prompt, hashes.named, valid_fraction, test_fraction, seed)[left]
    num_mirrored = int(np.isin(hashes.mirrored[left], hashes.content[left]).sum())
    return Verdicts(codes, num_sampled_out, num_mirrored // 2)


def pair_hashes(pair: PreferencePair) -> tuple[int, int, int]:
    """64-bit hashes of the row id, of the content, and of the content with its answers swapped."""
    content = content_key(pair.prompt, pair.chosen, pair.rejected)
    mirrored = content_key(pair.prompt, pair.rejected, pair.chosen)
    return int(_digest(pair.row_id), 16), int(content, 16), int(mirrored, 16)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def _is_first(values: np.ndarray) -> np.ndarray:
    """Whether each value occurs for the first time. Shape (N,), bool."""
    first = np.zeros(len(values), np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _splits(keys: np.ndarray, named: np.ndarray, valid_fraction: float, test_fraction: float, seed: int) -> np.ndarray:
    """Index into SPLITS for each row. Shape (N,), uint8."""
    unique, inverse = np.unique(keys, return_inverse=True)
    strongest = np.full(len(unique), UNNAMED, np.int8)
    np.maximum.at(strongest, inverse, named)  # SPLITS is ordered from weakest to strongest
    train, valid, test = (SPLITS.index(name) for name in ("train", "valid", "test"))
    is_train = strongest == train
    test_fractions = np.where(is_train & np.any(named == test), 0.0, test_fraction)
    hashed = _hashed_splits(unique, valid_fraction, test_fractions, seed)
    if np.any(named == valid):
        hashed[is_train & (hashed == valid)] = train
    return np.where(strongest > train, strongest, hashed)[inverse].astype(np.uint8)


def _hashed_splits(keys: np.ndarray, valid_fraction: float, test_fractions: np.ndarray, seed: int) -> np.ndarray:
    """Index into SPLITS: the lowest hashes are valid, the highest test, so that the two fractions do not interact."""
    place = _mix(keys, seed) / 2.0**64
    splits = np.full(len(keys), SPLITS.index("train"), np.uint8)
    splits[1 - place < test_fractions] = SPLITS.index("test")
    splits[place < valid_fraction] = SPLITS.index("valid")
    return splits


def _mix(values: np.ndarray, seed: int) -> np.ndarray:
    """Finaliser of splitmix64 over values and seed (Steele et al. 2014): a fresh uniform order per seed."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
