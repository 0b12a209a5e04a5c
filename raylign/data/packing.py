"""Pairs to rows: the layouts of a micro-batch, and the plan of which pairs share one.

Half of the tokens of a padded preference batch are padding or the prompt's second copy. The "shared" layout stores the
prompt once, both answers behind it, and fills rows with several pairs; a mask keeps apart what must not see each other.
Krishna et al. (2024), arXiv:2410.20305, describe prefix sharing for preference tuning; rows here are filled by
first-fit-decreasing instead of being cut from a stream, so no pair is ever split.

Shape letters as in `raylign.types`: B pairs, S row length, P/C/R prompt/chosen/rejected tokens, N scored tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raylign.errors import DataError, ShapeError
from raylign.types import Layout, PackedBatch, TokenizedPair

_ROW_MULTIPLE = 8  # attention kernels on GPUs want the mask's rows aligned to so many elements
_ROW_SLACK = 1.5  # rows may be this much longer than the longest item when that leaves less padding


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pairs of one forward and backward on one worker.

    Attributes:
        indices: positions in the caller's list.
        weight: 1.0, or 0.0 for a filler that repeats a pair only so that every worker runs as many collectives; the
            loss of a filler must be multiplied by it.
    """

    indices: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Item:
    """What occupies consecutive columns of one row: token ids, positions, and where the answers are."""

    input_ids: tuple[np.ndarray, ...]
    position_ids: tuple[np.ndarray, ...]
    length: int


def pair_tokens(pair: TokenizedPair, layout: Layout) -> int:
    """Tokens that a pair occupies in a layout, the number `plan_micro_batches` budgets."""
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    if layout == "shared":
        return prompt + chosen + rejected
    if layout == "packed":
        return 2 * prompt + chosen + rejected
    return 2 * (prompt + max(chosen, rejected))


def pack_pairs(
    pairs: Sequence[TokenizedPair],
    *,
    layout: Layout,
    pad_token_id: int,
    pair_index: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay B pairs out in the rows of one micro-batch.

    Args:
        pairs: B pairs, each with at least one prompt, chosen and rejected token.
        layout: "shared", "packed" or "padded", see `PackedBatch`.
        pad_token_id: fills unused columns; may equal the end-of-response token, nothing is looked up by id.
        pair_index: position of each pair in the caller's list, shape (B,); 0..B-1 when None.

    Returns:
        The batch on the CPU. Sequence b is the chosen answer of pair b, sequence B + b the rejected one.

    Raises:
        DataError: no pair, or a pair with an empty prompt or answer.
        ShapeError: `pair_index` has another length than `pairs`.
    """
    if not pairs:
        raise DataError("pack_pairs needs at least one pair, got none")
    index = list(range(len(pairs))) if pair_index is None else list(pair_index)
    if len(index) != len(pairs):
        raise ShapeError(f"pair_index has {len(index)} entries for {len(pairs)} pairs")
    for position, pair in zip(index, pairs, strict=True):
        if not (len(pair.prompt_ids) and len(pair.chosen_ids) and len(pair.rejected_ids)):
            raise DataError(
                f"pair {position} has {len(pair.prompt_ids)} prompt, {len(pair.chosen_ids)} chosen and "
                f"{len(pair.rejected_ids)} rejected tokens; each must have at least one"
            )

    items = [item for pair in pairs for item in _items(pair, layout)]
    lengths = [item.length for item in items]
    if layout == "padded":
        row_length, slots = max(lengths), [(row, 0) for row in _chosen_then_rejected(len(pairs))]
    else:
        row_length, slots = _best_rows(lengths)
    num_rows = 1 + max(row for row, _ in slots)

    input_ids = np.full((num_rows, row_length), pad_token_id, np.int64)
    position_ids = np.zeros((num_rows, row_length), np.int64)
    for item, (row, start) in zip(items, slots, strict=True):
        stop = start + item.length
        np.concatenate(item.input_ids, out=input_ids[row, start:stop], casting="unsafe")
        np.concatenate(item.position_ids, out=position_ids[row, start:stop])

    mask = _padding_mask(lengths, slots, num_rows, row_length) if layout == "padded" else None
    if mask is None:
        mask = _block_mask(pairs, lengths, slots, num_rows, row_length, shared=layout == "shared")
    score_from, score_sequence, ends = _scored(pairs, slots, row_length, shared=layout == "shared")
    labels = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=torch.from_numpy(mask),
        score_from=torch.from_numpy(score_from),
        score_labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        score_sequence=torch.from_numpy(score_sequence),
        end_positions=torch.from_numpy(ends),
        pair_index=torch.tensor(index, dtype=torch.int64),
        num_real_tokens=sum(lengths),
    )


def _items(pair: TokenizedPair, layout: Layout) -> list[_Item]:
    """One item per pair (shared) or one per answer (packed, padded; chosen first)."""
    prompt = len(pair.prompt_ids)
    positions = np.arange(prompt + max(len(pair.chosen_ids), len(pair.rejected_ids)))
    chosen = positions[prompt : prompt + len(pair.chosen_ids)]
    rejected = positions[prompt : prompt + len(pair.rejected_ids)]
    head = positions[:prompt]
    if layout == "shared":
        ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        return [_Item(ids, (head, chosen, rejected), pair.num_tokens)]
    return [
        _Item((pair.prompt_ids, pair.chosen_ids), (head, chosen), prompt + len(chosen)),
        _Item((pair.prompt_ids, pair.rejected_ids), (head, rejected), prompt + len(rejected)),
    ]


def _chosen_then_rejected(num_pairs: int) -> Iterable[int]:
    """Rows of the padded layout for items in the order chosen 0, rejected 0, chosen 1, ..."""
    return (half * num_pairs + b for b in range(num_pairs) for half in (0, 1))


def _best_rows(lengths: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Row length between the longest item and `_ROW_SLACK` times it that wastes least, and the slots at that length."""
    longest = _round_up(max(lengths))
    total = sum(lengths)
    fewest = -(-total // int(longest * _ROW_SLACK))
    most = -(-total // longest)
    # A row length is worth trying when it divides the tokens evenly over some number of rows.
    candidates = {longest} | {max(longest, _round_up(-(-total // rows))) for rows in range(fewest, most + 1)}
    best: tuple[int, int, list[tuple[int, int]]] | None = None
    for row_length in sorted(candidates):
        slots = first_fit_decreasing(lengths, row_length)
        area = row_length * (1 + max(row for row, _ in slots))
        if best is None or area < best[0]:
            best = (area, row_length, slots)
    assert best is not None
    return best[1], best[2]


def _round_up(length: int) -> int:
    return -(-length // _ROW_MULTIPLE) * _ROW_MULTIPLE


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Row and start column of each item; ties keep the items' order, so the result depends on nothing else.

    Args:
        lengths: tokens of each item, none above `capacity`.
        capacity: tokens of a row.
    """
    slots = [(0, 0)] * len(lengths)
    used: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, tokens in enumerate(used) if tokens + lengths[item] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        slots[item] = (row, used[row])
        used[row] += lengths[item]
    return slots


def _padding_mask(
    lengths: Sequence[int], slots: Sequence[tuple[int, int]], num_rows: int, row_length: int
) -> np.ndarray:
    """(rows, S) int64, 1 where a token is real."""
    mask = np.zeros((num_rows, row_length), np.int64)
    for length, (row, _) in zip(lengths, slots, strict=True):
        mask[row, :length] = 1
    return mask


def _block_mask(
    pairs: Sequence[TokenizedPair],
    lengths: Sequence[int],
    slots: Sequence[tuple[int, int]],
    num_rows: int,
    row_length: int,
    *,
    shared: bool,
) -> np.ndarray:
    """(rows, 1, S, S) bool: causal within an item, nothing between items, rejected never sees chosen.

    Padding sees itself only: a row of the mask without any True would make softmax return nan.
    """
    causal = np.tri(max(lengths), dtype=np.bool_)
    mask = np.zeros((num_rows, 1, row_length, row_length), np.bool_)
    columns = np.arange(row_length)
    mask[:, 0, columns, columns] = True
    for length, (row, start) in zip(lengths, slots, strict=True):
        stop = start + length
        mask[row, 0, start:stop, start:stop] = causal[:length, :length]
    if shared:
        for pair, (row, start) in zip(pairs, slots, strict=True):
            chosen = start + len(pair.prompt_ids)
            rejected = chosen + len(pair.chosen_ids)
            mask[row, 0, rejected : start + pair.num_tokens, chosen:rejected] = False
    return mask


def _scored(
    pairs: Sequence[TokenizedPair], slots: Sequence[tuple[int, int]], row_length: int, *, shared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions that predict each response token, its sequence, and each sequence's last position."""
    num_pairs = len(pairs)
    positions: list[np.ndarray] = []
    ends = np.empty(2 * num_pairs, np.int64)
    lengths = np.empty(2 * num_pairs, np.int64)
    for sequence in range(2 * num_pairs):
        is_rejected, b = divmod(sequence, num_pairs)
        pair = pairs[b]
        row, start = slots[b] if shared else slots[2 * b + is_rejected]
        answer = len(pair.rejected_ids) if is_rejected else len(pair.chosen_ids)
        prompt_end = row * row_length + start + len(pair.prompt_ids)
        first = prompt_end + (len(pair.chosen_ids) if shared and is_rejected else 0)
        predictors = np.arange(first - 1, first + answer - 1)
        predictors[0] = prompt_end - 1  # the prompt's last token predicts the first token of both answers
        positions.append(predictors)
        ends[sequence] = first + answer - 1
        lengths[sequence] = answer
    return np.concatenate(positions), np.repeat(np.arange(2 * num_pairs), lengths), ends


def plan_micro_batches(
    num_tokens_per_pair: Sequence[int], *, batch_tokens: int, num_workers: int
) -> list[list[MicroBatch]]:
    """Spread pairs over workers and cut each worker's share into micro-batches of similar lengths.

    Every pair is in exactly one micro-batch of weight 1 and every worker gets the same number of micro-batches. The
    plan is a function of the arguments alone. A pair longer than the budget is a micro-batch of its own.

    Args:
        num_tokens_per_pair: tokens of each pair, see `pair_tokens`.
        batch_tokens: token budget of one micro-batch.
        num_workers: training workers.

    Returns:
        One list per worker; longest pairs first, so that memory peaks at the first micro-batch.

    Raises:
        DataError: a budget or a number of workers below 1.
    """
    if batch_tokens < 1 or num_workers < 1:
        raise DataError(f"batch_tokens={batch_tokens} and num_workers={num_workers} must be at least 1")
    tokens = list(num_tokens_per_pair)
    shares = [_cut(share, tokens, batch_tokens) for share in _balanced_shares(tokens, num_workers)]
    target = max(len(share) for share in shares)
    return [_stretch(share, tokens, target) for share in shares]


def _balanced_shares(tokens: Sequence[int], num_workers: int) -> list[list[int]]:
    """Longest pair first to the worker with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    load = [(0, worker) for worker in range(num_workers)]
    for index in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        carried, worker = heapq.heappop(load)
        shares[worker].append(index)
        heapq.heappush(load, (carried + tokens[index], worker))
    return shares


def _cut(share: Sequence[int], tokens: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Consecutive pairs of a length-sorted share, as many as the budget holds."""
    batches: list[list[int]] = []
    used = 0
    for index in share:
        if not batches or used + tokens[index] > batch_tokens:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += tokens[index]
    return batches


def _stretch(batches: list[list[int]], tokens: Sequence[int], target: int) -> list[MicroBatch]:
    """Split the fullest micro-batches, then add fillers, until there are `target`."""
    while len(batches) < target:
        splittable = [i for i, batch in enumerate(batches) if len(batch) > 1]
        if not splittable:
            break
        fullest = max(splittable, key=lambda i: (sum(tokens[j] for j in batches[i]), -i))
        batch = batches[fullest]
        batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    missing = target - len(batches)
    if not missing:
        return [MicroBatch(tuple(batch)) for batch in batches]
    shortest = min(range(len(tokens)), key=lambda i: (tokens[i], i))
    return [MicroBatch(tuple(batch)) for batch in batches] + [MicroBatch((shortest,), weight=0.0)] * missing
