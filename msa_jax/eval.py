"""Evaluates a trained run: python eval.py --config=demo --workdir=runs/demo --memory_tokens=16384,65536

What is asked is a task. By default a memory of held-out text is encoded for every size, its questions are asked, and
the model generates freely. Scores are printed as a table and kept as JSON in the workdir.

Tasks (--task=NAME; docs/evaluation.md says more):
"""

from collections.abc import Sequence

from msa_jax.importing import exit_without

exit_without("train", "eval")  # before what needs it is imported

from absl import flags

from msa_jax import distributed
from msa_jax.cli.command import run_command
from msa_jax.errors import ConfigError
from msa_jax.evaluation import tasks


def _sizes(values: list[str]) -> list[int]:
    try:
        sizes = [int(v.replace("_", "")) for v in values]
    except ValueError:
        raise ConfigError(f"--memory_tokens must be integers, got {','.join(values)}.") from None
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--memory_tokens must name sizes of at least 1, got {','.join(values)}.")
    return sizes


def _evaluate(values: flags.FlagValues) -> None:
    # Here, because all that evaluates takes seconds to import.
    from msa_jax.evaluation.evaluate import evaluate, report
    from msa_jax.runs.config import RunConfig

    run = None if values.config is None else RunConfig.from_dict(values.config.to_dict())
    rows = evaluate(
        run, values.workdir, _sizes(values.memory_tokens), task=values.task, settings=values.set,
        baselines=values.baselines, folders=values.folder, memory=values.memory, out=values.json,
    )  # fmt: skip
    if distributed.is_main():
        print(f"\n{report(rows, values.task, values.workdir)}")


def _define(values: flags.FlagValues) -> None:
    own = dict(flag_values=values)
    flags.DEFINE_string("task", "needles", f"What is asked: {', '.join(tasks.described())}.", **own)
    flags.DEFINE_list("memory_tokens", ["16384"], "Sizes of memory, in tokens.", **own)
    flags.DEFINE_list("baselines", [], "What to compare with: bm25, bag_of_words, dense.", **own)
    flags.DEFINE_list("folder", [], "Folders of documents.jsonl and questions.jsonl.", **own)
    flags.DEFINE_string("memory", None, "Folder of a memory that is encoded once; default: in the workdir.", **own)
    flags.DEFINE_multi_string("set", [], "NAME=VALUE of the task's own settings.", **own)
    flags.DEFINE_string("json", None, "File of scores; default: eval.json or eval_TASK.json in the workdir.", **own)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    from msa_jax.inference.settings import modes_help

    described = "\n".join(f"  {name:<10} {line}" for name, line in tasks.described().items())
    modes = f"How documents are found (--config.evaluation.mode=NAME):\n{modes_help()}"
    run_command(_evaluate, f"{__doc__}{described}\n\n{modes}\n", _define, arguments, required=())


if __name__ == "__main__":
    main()
