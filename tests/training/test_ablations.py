"""The harness of ablations and the ways to ask, on a tiny model as it starts."""

import copy
import json
import pathlib
import shlex
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks.quality import ablation_report, ablations, asked, ways
from benchmarks.quality.asked import Results, memory_of
from benchmarks.quality.variants import CONFIG, VARIANTS, command, load_config, make_run, slug
from msa_jax.bank import encode_bank
from msa_jax.data import Document, Question
from msa_jax.errors import CheckpointError, ConfigError
from msa_jax.evaluation.memories import Memory
from msa_jax.inference import AskConfig
from msa_jax.runs.open import load_model
from tests.training.conftest import SETTINGS, dataset_of, save_start


@pytest.fixture(scope="module")
def config(haystack, tmp_path_factory):
    """A config file of one step, beside a folder of runs in which the run of seed 5 has done that step."""
    settings = copy.deepcopy(SETTINGS)
    settings["data"]["folder"] = str(haystack)
    settings["training"] |= {"phases": [{"steps": 1}], "keep_checkpoints": 3}
    path = tmp_path_factory.mktemp("ablations") / "tiny.py"
    path.write_text(
        "from msa_jax.runs.config import full_config\n\n\n"
        f"def get_config():\n    return full_config({settings!r})\n"
    )
    run = make_run(load_config(path), {}, 5)
    workdir = path.parent / "runs" / slug("base", 5)
    save_start(run, workdir)
    (workdir / "metrics.jsonl").write_text("")
    return path


@pytest.fixture(scope="module")
def trained(config):
    """Run, model, renderer, and a memory of six questions with its bank."""
    run = make_run(load_config(config), {}, 5)
    model, renderer = load_model(run, config.parent / "runs" / "base_5", 1)
    memory = memory_of(run, renderer, memory_tokens=2048, num_questions=6)
    return run, model, renderer, memory, encode_bank(model, memory.packed)


def options_of(config, *more):
    folder = config.parent
    return ablations.parser().parse_args(
        ["--config", str(config), "--runs", str(folder / "runs"), "--out", str(folder / "out.json"), *more]
    )


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # within ml_collections
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_by_flags_and_changes_nothing_else(name, monkeypatch):
    config = load_config(CONFIG)
    run, base = make_run(config, VARIANTS[name], 3), make_run(config, {}, 3)
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=holder)
    flags.DEFINE_string("workdir", "", "", flag_values=holder)
    told = shlex.split(command(name, 3))
    assert told[:2] == ["python", "train.py"] and "," not in name  # commas part names
    monkeypatch.setattr(sys, "argv", [told[1], f"--config={CONFIG}", *told[3:]])  # where fields are looked for
    holder(sys.argv)
    assert run.to_dict() == base.from_dict(holder.config.to_dict()).to_dict()

    def leaves(value, path=""):
        if isinstance(value, dict):
            parts = [leaves(one, f"{path}.{key}".removeprefix(".")) for key, one in value.items()]
        elif isinstance(value, tuple) and value:
            parts = [leaves(one, f"{path}[{i}]") for i, one in enumerate(value)]
        else:
            return {path: value}
        return {field: leaf for part in parts for field, leaf in part.items()}

    mine, theirs = leaves(run.to_dict()), leaves(base.to_dict())
    assert {field for field in mine if mine[field] != theirs[field]} == set(VARIANTS[name])
    assert {field: mine[field] for field in VARIANTS[name]} == VARIANTS[name]


def test_a_variant_that_names_no_field_is_refused():
    with pytest.raises(ConfigError, match=r"no field 'model.topk'"):
        make_run(load_config(CONFIG), {"model.topk": 3}, 0)
    with pytest.raises(ConfigError, match="No variant 'bse'; there are base,"):
        ablations.find("bse")


def test_what_was_learned_when():
    lines = [(10, 0.96, 3.0), (20, 0.5, 0.9), (30, 0.95, 1.2), (40, 0.99, 0.9), (50, 1.0, 0.5)]
    metrics = "\n".join(json.dumps({"step": s, "recall@1": r, "lm_loss": x}) for s, r, x in lines)
    assert ablations.learned(metrics) == {"recall@1 0.95": 30, "lm_loss 1.0": 40, "lm_loss 0.1": None}


def test_a_run_is_asked_once_whatever_interrupts(config, monkeypatch, quick_compiles):
    asked_ways = []

    def noted(model, renderer, bank, memory, way, **settings):
        if len(asked_ways) == 1:
            asked_ways.append("killed")
            raise KeyboardInterrupt
        assert (bank is None) == (memory.tokens < 1200 and way.bank == "none")  # encoded where something reads it
        asked_ways.append((memory.tokens > 1200, way))
        return ways.answers(model, renderer, None, memory, ways.WAYS["no context"], slots=1, **settings)

    monkeypatch.setattr(asked, "answers", noted)
    options = options_of(config, "--questions", "2", "--memory_tokens", "1024,1536", "--ways", "latent,no context")
    with pytest.raises(KeyboardInterrupt):
        ablations.run_variant(Results(options.out, "first"), "base", 5, options)
    assert len(json.loads(options.out.read_text())["runs"]["base_5"]["rows"]) == 1
    assert ablations.run_variant(Results(options.out, "second"), "base", 5, options)
    latent, nothing = ways.WAYS["latent"], ways.WAYS["no context"]
    assert asked_ways == [(False, latent), "killed", (False, nothing), (True, latent), (True, nothing)]
    record = json.loads(options.out.read_text())
    assert record["commands"] == ["first", "second"] and record["versions"]["jax"]
    run = record["runs"]["base_5"]
    assert (run["variant"], run["seed"], run["steps"]) == ("base", 5, 1)
    assert [(row["memory_tokens"], row["way"]) for row in run["rows"]] == [
        (1024, "latent"), (1024, "no context"), (1536, "latent"), (1536, "no context"),
    ]  # fmt: skip
    assert all(row["questions"] == 2 for row in run["rows"])
    assert ablations.run_variant(Results(options.out, "second"), "base", 5, options) and len(asked_ways) == 5
    assert "| base | 1 | never | never |" in ablation_report.table(record["runs"].values())


def test_ways_to_ask(trained, quick_compiles):
    _, model, renderer, memory, bank = trained
    told = lambda name: ways.answers(model, renderer, bank, memory, ways.find_way(name), slots=1)  # noqa: E731
    wanted = [int(memory.numbers[memory.place[q.supporting_ids[0]]]) for q in memory.questions]
    given = lambda name: ways.given_documents(ways.find_way(name).retriever, memory, 0)  # noqa: E731

    oracle = told("oracle reader")
    row = ways.scores(memory, oracle)
    assert row["id_exact_match"] == 1.0 and not any(name.startswith("router") for name in row)
    assert [[c.number for c in one.citations] for one in oracle] == [[n] for n in wanted]
    assert all(not one.rounds[0].documents.size for one in oracle)
    with_bank = told("oracle and bank")
    assert [one.citations[0].number for one in with_bank] == wanted
    assert all(one.rounds[0].documents.shape[0] == 1 for one in with_bank)
    assert len(ways.scores(memory, with_bank)["router_recall@1"]) == 1

    found = ways.bm25_numbers(memory, count=3)
    whole = ways.bm25_numbers(memory, count=3, whole_keys=True)
    # The haystack is made of the words of the keys, so that only whole keys tell documents apart.
    assert ways.recall(whole, memory, 1) == 1.0 and [row[0] for row in whole] == wanted
    assert 0 < ways.recall(found, memory, len(memory.numbers) // 2) <= 1 and ways.recall(found, memory, 1) < 1
    assert given("BM25 reader") == [(row[0],) for row in found]
    random = given("random reader")
    assert random != [(n,) for n in wanted] and all(row[0] in memory.originals for row in random)
    assert given("generate") == given("no context") == [()] * 6


def test_bm25_does_not_look_for_the_words_that_every_question_has():
    """One short document of them alone would be the first for any question."""
    texts = {1: "left-match is 5", 2: "mentioned", 3: "match-left is 7", 4: "a left match of right and left", 5: "none"}
    questions = [Question("q", f"Which number is mentioned for {key}?", (), ()) for key in ("left-match", "match-left")]
    originals = {n: Document(str(n), "", text) for n, text in texts.items()}
    memory = Memory(packed=None, originals=originals, numbers=list(texts), place={}, questions=questions, tokens=0)
    first = lambda **options: [row[0] for row in ways.bm25_numbers(memory, count=2, **options)]  # noqa: E731
    assert first(whole_keys=True) == [1, 3]
    assert 2 not in first()


def test_a_checkpoint_that_is_not_there_is_named(config, trained):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are those of 1"):
        load_model(trained[0], config.parent / "runs" / "base_5", 7)


def test_given_documents_need_the_mode_that_reads_them():
    with pytest.raises(ConfigError, match='need mode "router", got .4,. in mode \'generate\''):
        AskConfig(given_documents=(4,))


def test_replies_without_quotes_are_what_latent_asking_writes(trained, quick_compiles):
    run, model, renderer, memory, _ = trained
    batch = next(iter(dataset_of(run, renderer.tokenizer, samples="latent")))
    prompt, _ = renderer.prompt(memory.questions[0].question)
    middle = renderer.end_of_retrieve() + renderer.restated(memory.questions[0].question)
    answer = ways.answers(model, renderer, None, memory, ways.WAYS["no context"], slots=1)[0]
    assert answer.prompt_tokens == len(prompt) + len(middle)
    told = batch.questions
    for tokens, weights, mask in zip(told.tokens, told.loss_weights, told.mask, strict=True):
        text = renderer.tokenizer.decode(tokens[mask].tolist())
        assert text.count("<End-of-Retrieve>") == 1 and "<|object_ref_end|>[" not in text
        assert (weights > 0).sum() == 9  # the end of retrieval, seven digits, the end


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_labels_of_a_share_of_questions(trained, share):
    run, tokenizer = trained[0], trained[2].tokenizer
    some, every = (iter(dataset_of(run, tokenizer, label_fraction=f)) for f in (share, 1.0))
    labelled = []
    for _ in range(30):
        mine, theirs = next(some).questions, next(every).questions
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        has = mine.relevant.any(axis=1)
        np.testing.assert_array_equal(mine.relevant[has], theirs.relevant[has])
        labelled += has.tolist()
    assert abs(np.mean(labelled) - share) <= 4 * (share * (1 - share) / len(labelled)) ** 0.5
    with pytest.raises(ConfigError, match="label_fraction must be in 0..1"):
        make_run(load_config(CONFIG), {"data.label_fraction": 1.5}, 0)


def test_the_table_tells_means_and_spreads(tmp_path):
    def run(variant, seed, exact, learned):
        row = {"way": "generate", "step": 0, "router_recall@1": [1.0, exact]}
        row |= dict.fromkeys(("id_exact_match", "exact_match"), exact)
        row["memory_tokens"] = 1 << 14
        rows = [row, row | {"step": 20, "exact_match": 0.0}]
        rows += [row | {"way": "constrained", "exact_match": 0.125}] * (variant == "a")
        return {"variant": variant, "seed": seed, "changes": {}, "learned": learned, "rows": rows}

    keys = "recall@1 0.95", "lm_loss 0.1"
    runs = [run("b", s, e, dict(zip(keys, k, strict=True))) for s, e, k in ((1, 0.5, (30, None)), (0, 1.0, (20, 50)))]
    runs.append(run("a", 0, 0.25, dict.fromkeys(keys)))
    lines = ablation_report.table(runs).splitlines()
    spread = "0.75 (0.50 to 1.00)"
    assert lines[2] == f"| b | 2 | 25 (20 to 30) | 50, 1 of 2 never | {spread} | {spread} | {spread} | - | - |"
    assert lines[3] == "| a | 1 | never | never | 0.25 | 0.25 | 0.25 | 0.12 | - |"
    ablation_report.figure(runs, tmp_path / "figure.png")
    assert pathlib.Path(tmp_path / "figure.png").stat().st_size > 5000
