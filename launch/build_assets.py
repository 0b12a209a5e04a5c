r"""Build the embedded models and data of `raylign/assets` from downloaded sources.

    python -m launch.build_assets --corpus DIR --sft FILE --labels FILE --eval-prompts FILE... --pairs FILE \
        --refusals FILE [--init DIR] --work DIR --output DIR [--stages data lm sft judge cost card]

Stages, each restartable by itself from what the one before left in `--work` and `--output`:

    data    cut the data files that may ship                                           -> *.jsonl, *.jsonl.gz
    lm      pretrain (from `--init`, or a fresh tokenizer and model) on the corpus     -> work/lm
    sft     fine-tune on instructions and, on purpose, on unsafe answers               -> tiny_chat
    judge   fine-tune `--init` (or work/lm) as a safe/unsafe classifier                -> tiny_judge
    cost    fit a cost head to safety labels on hidden states of tiny_chat, and its card -> tiny_cost
    card    measure and write the cards of policy and judge                            -> tiny_*/README.md

Nothing trains on an evaluation prompt or a test split, and neither policy nor cost head learn from
prompts of the judge.
Every number in a card is measured by the recipe. The budgets are in tokens; the optional limits in seconds end a stage
early on a slow machine, and then the result depends on its speed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from launch.asset_card import card_stage
from launch.asset_cost import cost_stage
from launch.asset_data import build_eval_prompts, build_pairs, build_refusal_labels
from launch.asset_plan import AssetBudget, AssetSources
from launch.asset_stages import finetune_stage, judge_stage, pretrain_stage
from raylign.assets import EVAL_PROMPTS, PAIRS, REFUSAL_LABELS
from raylign.errors import ConfigError, DataNotFoundError, ModelError, RaylignError

STAGES = ("data", "lm", "sft", "judge", "cost", "card")


def build_assets(
    sources: AssetSources, output: Path, *, work: Path, budget: AssetBudget, stages: Sequence[str] = STAGES
) -> None:
    """Run stages in their order.

    Args:
        sources: files to read; all are checked before anything starts.
        output: asset directory to write.
        work: directory for the pretrained model and the stages' measurements.
        budget: sizes, budgets and seed.
        stages: names out of `STAGES`.

    Raises:
        ConfigError: an unknown stage.
        DataNotFoundError: a source file is missing.
        ModelError: the model directory to continue from is missing.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown or not stages:
        raise ConfigError(f"stages={list(stages)} must be some of {list(STAGES)} (--stages)")
    _check_sources(sources)
    if "data" in stages:
        build_pairs(sources.pairs, output / PAIRS)
        build_eval_prompts(sources.eval_prompts, output / PAIRS, output / EVAL_PROMPTS)
        build_refusal_labels(sources.refusals, output / REFUSAL_LABELS)
    if "lm" in stages:
        pretrain_stage(sources, budget, work)
    if "sft" in stages:
        finetune_stage(sources, budget, work, output)
    if "judge" in stages:
        judge_stage(sources, budget, work, output)
    if "cost" in stages:
        cost_stage(sources, budget, work, output)
    if "card" in stages:
        card_stage(sources, budget, work, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `raylign assets build`.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="raylign assets build", description="Build the embedded models and data.")
    parser.add_argument("--corpus", type=Path, required=True, help="directory of *.jsonl.gz with columns text, source")
    parser.add_argument("--sft", type=Path, required=True, help="instruction rows: messages, kind")
    parser.add_argument(
        "--labels", type=Path, required=True, help="safety labels: prompt, response, safe, source, split"
    )
    parser.add_argument("--eval-prompts", type=Path, required=True, nargs="+", help="prompts nothing may train on")
    parser.add_argument(
        "--pairs", type=Path, required=True, help="preference pairs: hh-rlhf rows ship, test is held out"
    )
    parser.add_argument("--refusals", type=Path, required=True, help="human-labelled XSTest completions")
    parser.add_argument("--init", type=Path, help="model directory to continue from; without it, from scratch")
    parser.add_argument("--output", type=Path, required=True, help="asset directory to write")
    parser.add_argument("--work", type=Path, required=True, help="directory for intermediate results")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    for field in fields(AssetBudget):
        flag = f"--{field.name.removeprefix('is_').replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, dest=field.name, action="store_true")
        else:
            kind = float if field.name.endswith("_seconds") else int
            parser.add_argument(flag, dest=field.name, type=kind, default=field.default)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sources = AssetSources(
        corpus=options.corpus,
        sft=options.sft,
        labels=options.labels,
        eval_prompts=tuple(options.eval_prompts),
        pairs=options.pairs,
        refusals=options.refusals,
        init=options.init,
    )
    budget = AssetBudget(**{field.name: getattr(options, field.name) for field in fields(AssetBudget)})
    try:
        build_assets(sources, options.output, work=options.work, budget=budget, stages=options.stages)
    except RaylignError as error:
        parser.exit(2, f"{type(error).__name__}: {error}\n")


def _check_sources(sources: AssetSources) -> None:
    files = {
        "--sft": (sources.sft,),
        "--labels": (sources.labels,),
        "--eval-prompts": sources.eval_prompts,
        "--pairs": (sources.pairs,),
        "--refusals": (sources.refusals,),
    }
    for option, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise DataNotFoundError(f"{path} is not a file ({option})")
    if not sources.corpus.is_dir():
        raise DataNotFoundError(f"{sources.corpus} is not a directory (--corpus)")
    if sources.init is not None and not sources.init.is_dir():
        raise ModelError(f"{sources.init} is not a model directory (--init)")


if __name__ == "__main__":
    main()
