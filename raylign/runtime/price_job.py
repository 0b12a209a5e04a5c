"""The price of every stored pair, by the cost model of the run. Cost > 0 is unsafe, cost <= 0 is safe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import torch

from raylign.config import CostModelSection, RunConfig
from raylign.cost.ledger import measured
from raylign.errors import DataError
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import predict
from raylign.runtime.cost_scorer import make_text_cost
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.execution import execution
from raylign.runtime.features_job import pairs_from_table, states_from_column
from raylign.runtime.fitted_cost import COST_COLUMNS, HEAD_COST_COLUMNS, FittedCost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.pair_states import VERDICT_COLUMNS
from raylign.runtime.rank_job import pair_folds

if TYPE_CHECKING:
    import ray.data

PRICED_DIR = "priced"
_ROWS_PER_CALL = 128
_KEPT_COLUMNS = ("row_id", "prompt_key", "split", *VERDICT_COLUMNS)


def price_pairs(
    features: ray.data.Dataset,
    fitted: FittedCost,
    *,
    config: RunConfig,
    layers: tuple[int, ...],
    model_path: str,
    directory: Path,
    options: ActorOptions,
) -> None:
    """Write ids, splits, verdicts and `COST_COLUMNS` of all pairs below `priced/`, one block at a time.

    With several members the `HEAD_COST_COLUMNS` come too. Members price one fold after another, each in a pool of its
    own, so that no more are loaded at a time than there are actors.

    Args:
        features: pairs with token ids and states.
        fitted: cost model.
        config: section cost_model.
        layers: transformer layers of the states.
        model_path: directory of the policy, readable on every node.
        directory: of the cost phase.
        options: of the actors that price texts.
    """
    priced = directory / PRICED_DIR
    shutil.rmtree(priced, ignore_errors=True)
    ledger = options.ledger if fitted.full is None else None  # heads take free CPUs, with which the phase is charged
    if fitted.full is not None:
        shared = ray.put((fitted, fitted.positions(layers)))
        parts = {
            "": features.map_batches(price_table, batch_format="pyarrow", batch_size=1024, fn_kwargs={"shared": shared})
        }
    else:
        pairs = features.drop_columns(["chosen_states", "rejected_states"])
        parts = {
            f"part{fold}": _priced_by_texts(
                pairs.map_batches(
                    of_fold,
                    batch_format="pyarrow",
                    fn_kwargs={"fold": fold, "num_folds": fitted.num_folds, "seed": fitted.fold_seed},
                ),
                (model_path, fitted, str(directory), config.cost_model, options, fold),
                options,
            )
            for fold in (FULL, *range(fitted.num_folds))
        }
    for name, costs in parts.items():
        with measured(ledger, "price_pairs", options.pool_devices), execution(costs):
            costs.write_parquet(str(priced / name))


def _priced_by_texts(pairs: ray.data.Dataset, arguments: tuple[Any, ...], options: ActorOptions) -> ray.data.Dataset:
    blocks = pairs.repartition(target_num_rows_per_block=_ROWS_PER_CALL) if options.num_actors > 1 else pairs
    return blocks.map_batches(
        PairPricer,
        fn_constructor_args=arguments,
        batch_size=_ROWS_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    )


def of_fold(table: pa.Table, *, fold: int, num_folds: int, seed: int) -> pa.Table:
    """The pairs that what was fitted without a fold prices: the training pairs in it; of `FULL` all other pairs.

    Args:
        table: with prompt_key and split.
        fold: number of the fold, or `FULL`.
        num_folds: fits that left a fold out, 0 when nothing did.
        seed: of the folds.
    """
    if not num_folds:
        return table
    own = pair_folds(table, num_folds=num_folds, seed=seed)
    return table.filter(pa.array((own == fold).tolist(), pa.bool_()))


def price_table(table: pa.Table, *, shared: Any) -> pa.Table:
    """Price one block by states: training pairs by the head of their fold, all others by the full head."""
    fitted, positions = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    fold = torch.full((len(table),), FULL)
    if fitted.heads:
        in_train = torch.tensor([split == "train" for split in table["split"].to_pylist()], dtype=torch.bool)
        own = grouped_folds(table["prompt_key"].to_pylist(), len(fitted.heads), fitted.fold_seed)
        fold = torch.where(in_train, own, fold)
    costs = []
    for name in ("chosen_states", "rejected_states"):
        states = torch.from_numpy(states_from_column(table[name])[:, positions].copy())
        members = torch.zeros(len(table), fitted.full.num_heads)
        for k in torch.unique(fold).tolist():
            head = fitted.full if k == FULL else fitted.heads[k]
            members[fold == k] = predict(head, states[fold == k]).head_rewards
        costs.append(members.numpy())
    return _priced(table, fold.numpy(), costs)


class PairPricer:
    """Prices tables of tokenized pairs by what reads texts; holds it, so it becomes an actor in the pool.

    Args:
        model_path: directory of the policy.
        fitted: what prices responses.
        cost_dir: of the cost phase.
        cost_model: `cost_model` section.
        options: size and number types of the actor.
        fold: that members must not have seen, `FULL` for those fitted to all training pairs.
    """

    def __init__(
        self,
        model_path: str,
        fitted: FittedCost,
        cost_dir: str,
        cost_model: CostModelSection,
        options: ActorOptions,
        fold: int,
    ) -> None:
        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        self._fold = fold
        self._reward = make_text_cost(model_path, fitted, cost_dir, cost_model=cost_model, options=options, fold=fold)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The ids of a table and its costs."""
        beliefs = self._reward.posterior_of_pairs(pairs_from_table(table))
        return _priced(table, np.full(len(table), self._fold), [-belief.head_rewards.numpy() for belief in beliefs])


def _priced(table: pa.Table, fold: np.ndarray, members: list[np.ndarray]) -> pa.Table:
    """Ids with the members' costs (n, M) of both answers and their means."""
    table = table.select(_KEPT_COLUMNS).append_column("fold", pa.array(fold, pa.int16()))
    for name, costs in zip(COST_COLUMNS, members, strict=True):
        table = table.append_column(name, pa.array(costs.mean(1), pa.float32()))
    if members[0].shape[1] > 1:
        for name, costs in zip(HEAD_COST_COLUMNS, members, strict=True):
            table = table.append_column(name, pa.array(list(costs), pa.list_(pa.float32())))
    return table


def read_priced(directory: Path) -> pa.Table:
    """What the cost phase wrote of the pairs: ids, splits, verdicts, fold and costs."""
    return pyarrow.dataset.dataset(directory / PRICED_DIR).to_table()


def attach_costs(pairs: ray.data.Dataset, directory: Path) -> ray.data.Dataset:
    """Add the columns of the costs to every pair, lazily.

    Args:
        pairs: with row_id.
        directory: of the cost phase.
    """
    table = read_priced(directory)
    names = [name for name in (*COST_COLUMNS, *HEAD_COST_COLUMNS) if name in table.column_names]
    shared = ray.put(table.select(["row_id", *names]).combine_chunks())
    return pairs.map_batches(with_costs, batch_format="pyarrow", fn_kwargs={"shared": shared})


def with_costs(table: pa.Table, *, shared: Any) -> pa.Table:
    """One block of pairs with their costs, found by row_id.

    Raises:
        DataError: pairs without a cost.
    """
    priced = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    place = pc.index_in(table["row_id"], value_set=priced["row_id"])
    if place.null_count:
        raise DataError(f"{place.null_count} pairs have no cost: the cost phase saw other pairs; rerun it")
    for name in priced.column_names[1:]:
        table = table.append_column(name, priced[name].take(place))
    return table
