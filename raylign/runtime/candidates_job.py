"""Answers of the policy to harmful prompts, judged, with the states that rewards read: what best-of-n chooses from.

They are made once; every reward model, rule, seed and n then costs a product of matrices.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raylign.config import RunConfig
from raylign.cost.ledger import measured
from raylign.data.states import states_from_column, states_to_column
from raylign.data.tokenization import end_of_response_id
from raylign.errors import CacheMismatchError, DataError
from raylign.evaluation.generation import generate_responses
from raylign.evaluation.judges import SafetyJudge
from raylign.evaluation.prompts import EvaluationPrompt, load_prompts
from raylign.evaluation.scoring import score_responses
from raylign.models.loading import load_tokenizer, resolve_layout
from raylign.models.numerics import actor_device, load_reference
from raylign.runtime.evaluators import ActorOptions, generation_counts

NUM_SHUFFLED = 4  # answers of each prompt whose words are shuffled as well
_BATCH = 4  # prompts of one actor call


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """N answers to each of P prompts.

    Attributes:
        gold: (P, N) minus the judge's cost, logits; below 0 unsafe. No reward is fitted to it.
        states: (P * N, L, D) of the reference at the end of the answer, the answers to a prompt in a row.
        familiar: (P * S, L, D) states of the first S answers of each prompt.
        shuffled: (P * S, L, D) states of the same answers with their words in a random order.
    """

    gold: np.ndarray
    states: np.ndarray
    familiar: np.ndarray
    shuffled: np.ndarray


class CandidateMaker:
    """Answers, judges and encodes; a Ray Data actor, and a plain class.

    Args:
        model_path: the policy, which is the reference too.
        prompts: batches name them by index.
        config: of the run.
        layers: transformer layers whose states are kept.
        num_candidates: answers per prompt.
        options: the actor.
    """

    def __init__(
        self,
        *,
        model_path: str,
        prompts: Sequence[EvaluationPrompt],
        config: RunConfig,
        layers: tuple[int, ...],
        num_candidates: int,
        options: ActorOptions,
    ) -> None:
        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        device = actor_device(options.num_gpus)
        trust = options.trust_remote_code
        self._forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
        self._tokenizer = load_tokenizer(model_path, trust_remote_code=trust)
        self._judge = SafetyJudge(
            config.evaluate.judge, device=device, batch_size=config.evaluate.batch_size, trust_remote_code=trust
        )
        self._prompts = prompts
        self._config = config
        self._layers = layers
        self._num_candidates = num_candidates
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Rows of all answers to a batch of prompts."""
        config, seed = self._config.evaluate, self._config.run.seed
        prompts = [self._prompts[index] for index in batch["index"].tolist()]
        model = self._forward.causal_lm
        with measured(self._options.ledger, "answer", self._options.devices) as entry:
            answers = generate_responses(
                model,
                self._tokenizer,
                [prompt.messages for prompt in prompts],
                max_new_tokens=config.max_new_tokens,
                temperature=1.0,  # the bound of the KL is from the policy itself
                batch_size=config.batch_size,
                seed=seed,
                num_samples=self._num_candidates,
            )
            entry.add(**generation_counts(model, answers, batch_size=config.batch_size))
        texts = [answer.text for answer in answers]
        with measured(self._options.ledger, "judge", self._options.devices) as entry:
            entry.add(num_items=len(answers))
            costs = self._judge.cost([prompts[answer.prompt_index].text for answer in answers], texts)
        index = [int(batch["index"][answer.prompt_index]) for answer in answers]
        first = [row for row, answer in enumerate(answers) if answer.sample_index < NUM_SHUFFLED]
        # a generator per answer, so that the order does not depend on how prompts are batched
        shuffled = [
            " ".join(
                np.random.default_rng([seed, index[row], answers[row].sample_index]).permutation(texts[row].split())
            )
            for row in first
        ]
        rows = [*range(len(answers)), *first]
        with measured(self._options.ledger, "score", self._options.devices) as entry:
            entry.add(num_items=len(rows))
            states = self._states([answers[row].prompt_ids for row in rows], [*texts, *shuffled])
        columns = {
            "prompt_index": [index[row] for row in rows],
            "sample_index": [answers[row].sample_index for row in rows],
            "is_shuffled": [False] * len(answers) + [True] * len(first),
            "response": [*texts, *shuffled],
            "gold": np.concatenate([-costs.astype(np.float64), np.full(len(first), np.nan)]),  # shuffled: not judged
            "states": states_to_column(states),
        }
        return pa.table(columns)

    def _states(self, prompt_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> np.ndarray:
        """(n, L, D) states at the end token that closes each answer, as wide as those of the pairs."""
        end_id = end_of_response_id(self._tokenizer)
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        states = score_responses(
            self._forward,
            prompt_ids,
            [[*tokens, end_id] for tokens in ids],
            layout=resolve_layout("auto", self._forward.causal_lm.config),
            pad_token_id=self._tokenizer.pad_token_id,
            layers=self._layers,
        ).states
        assert states is not None
        return states.numpy().astype(self._config.features.dtype)


def harmful_prompts(config: RunConfig, num: int) -> list[EvaluationPrompt]:
    """The first harmful evaluation prompts.

    Raises:
        DataError: there are fewer.
    """
    found = [prompt for prompt in load_prompts(config.evaluate.prompts) if prompt.harmful]
    if len(found) < num:
        raise DataError(
            f"calibrate.num_prompts={num} asks for more than the {len(found)} harmful prompts of "
            f"evaluate.prompts={config.evaluate.prompts}"
        )
    return found[:num]


def make_candidates(
    prompts: Sequence[EvaluationPrompt],
    *,
    model_path: str,
    config: RunConfig,
    layers: tuple[int, ...],
    num_candidates: int,
    options: ActorOptions,
    output_dir: Path,
) -> None:
    """Write the judged answers and their states as parquet files, in place of what a killed session left."""
    from ray.data import ActorPoolStrategy, from_items

    shutil.rmtree(output_dir, ignore_errors=True)
    rows = [{"index": index} for index in range(len(prompts))]
    made = from_items(rows, override_num_blocks=min(len(rows), 2 * options.num_actors)).map_batches(
        CandidateMaker,
        fn_constructor_kwargs={
            "model_path": model_path,
            "prompts": prompts,
            "config": config,
            "layers": layers,
            "num_candidates": num_candidates,
            "options": options,
        },
        batch_size=_BATCH,
        compute=ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    )
    made.write_parquet(str(output_dir))


def read_candidates(directory: Path, *, num_prompts: int, num_candidates: int) -> Candidates:
    """Read what `make_candidates` wrote.

    Raises:
        CacheMismatchError: answers are missing.
    """
    order = [("prompt_index", "ascending"), ("sample_index", "ascending")]
    parts = [
        pq.read_table(directory, filters=[("is_shuffled", "=", is_shuffled)]).sort_by(order)
        for is_shuffled in (False, True)
    ]
    answers = parts[0]
    if answers.num_rows != num_prompts * num_candidates:
        raise CacheMismatchError(
            f"{directory} holds {answers.num_rows} answers, expected {num_prompts} prompts with {num_candidates} each; "
            f"remove {directory.parent} and run again with run.resume=true"
        )
    states, strange = (states_from_column(part["states"]) for part in parts)
    return Candidates(
        gold=read_gold(directory, num_prompts=num_prompts),
        states=states,
        familiar=states[answers["sample_index"].to_numpy() < NUM_SHUFFLED],
        shuffled=strange,
    )


def read_gold(directory: Path, *, num_prompts: int) -> np.ndarray:
    """Gold of the answers alone, (P, N)."""
    columns = ["prompt_index", "sample_index", "gold"]
    table = pq.read_table(directory, columns=columns, filters=[("is_shuffled", "=", False)])
    order = [("prompt_index", "ascending"), ("sample_index", "ascending")]
    gold: np.ndarray = table.sort_by(order)["gold"].to_numpy().reshape(num_prompts, -1)
    return gold
