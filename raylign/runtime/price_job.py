"""The price of every stored pair, by the cost model of the run. Cost > 0 is unsafe, cost <= 0 is safe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import torch

from raylign.config import CostModelSection, RunConfig
from raylign.errors import DataError
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import predict
from raylign.runtime.cost_scorer import make_text_cost
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table, states_from_column
from raylign.runtime.fitted_cost import COST_COLUMNS, HEAD_COST_COLUMNS, FittedCost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.pair_states import VERDICT_COLUMNS

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
    options: ActorOptions,
) -> ray.data.Dataset:
    """Ids, splits, verdicts and `COST_COLUMNS` of all pairs, lazily, one block at a time.

    With several members the `HEAD_COST_COLUMNS` come too.

    Args:
        features: pairs with token ids and states.
        fitted: cost model.
        config: section cost_model.
        layers: transformer layers of the states.
        model_path: directory of the policy, readable on every node.
        options: of the actors that price texts.
    """
    if fitted.full is not None:
        shared = ray.put((fitted, fitted.positions(layers)))
        return features.map_batches(price_table, batch_format="pyarrow", batch_size=1024, fn_kwargs={"shared": shared})
    pairs = features.drop_columns(["chosen_states", "rejected_states"])
    blocks = pairs.repartition(target_num_rows_per_block=_ROWS_PER_CALL) if options.num_actors > 1 else pairs
    return blocks.map_batches(
        PairPricer,
        fn_constructor_args=(model_path, config.cost_model, options),
        batch_size=_ROWS_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    )


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
        for k in fold.unique().tolist():
            head = fitted.full if k == FULL else fitted.heads[k]
            members[fold == k] = predict(head, states[fold == k]).head_rewards
        costs.append(members.numpy())
    return _priced(table, fold.numpy(), costs)


class PairPricer:
    """Prices tables of tokenized pairs by a classifier of texts; holds it, so it becomes an actor in the pool.

    Args:
        model_path: directory of the policy.
        cost_model: `cost_model` section.
        options: size and number types of the actor.
    """

    def __init__(self, model_path: str, cost_model: CostModelSection, options: ActorOptions) -> None:
        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        self._reward = make_text_cost(model_path, cost_model, options=options)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The ids of a table and its costs."""
        beliefs = self._reward.posterior_of_pairs(pairs_from_table(table))
        return _priced(table, np.full(len(table), FULL), [-belief.head_rewards.numpy() for belief in beliefs])


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
