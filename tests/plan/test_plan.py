"""`python -m msa_jax.plan`: what is refused, sizes by arithmetic, what is chosen, small programs compiled for TPUs."""

import importlib.util
import json
import math

import jax
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.errors import ConfigError
from msa_jax.plan import choose, estimate, measure, programs, report, settings, topologies
from msa_jax.plan.__main__ import main
from msa_jax.plan.measure import Usage
from msa_jax.plan.settings import Bank, Sizes, parse_banks, parse_mesh, parse_tokens
from msa_jax.plan.topologies import Topology
from msa_jax.sharding import MeshConfig
from msa_jax.spec import LayerSpec

pytestmark = pytest.mark.usefixtures("optimised")
GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: `make tpu` installs it."
)
# 4B by hand: per layer q, o; k, v; MLP; norms; then routers, embedding and final norm.
LAYER = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
PARAMETERS = 36 * LAYER + 18 * 2560 * (4096 + 1024) + 151_936 * 2560 + 2560
# 100M tokens are 1,562,500 chunks, and 12 * 2^17 places for them.
PLACES, VECTORS = 1_572_864, 18 * 1_572_864 * 1024


@pytest.fixture
def compiles(monkeypatch):
    """What is compiled, in place of compiling it; `answer` may be replaced."""

    class Compiles(list):
        def answer(self, program):
            raise AssertionError("nothing may be compiled")

    seen = Compiles()

    def compiled(program):
        seen.append(program)
        return seen.answer(program)

    monkeypatch.setattr(measure, "compiled", compiled)
    return seen


@pytest.mark.parametrize(
    "text, count",
    [("100M", 10**8), ("64Ki", 65_536), ("1.5k", 1500), ("7", 7), ("1G", 10**9), ("2mi", 2**21), (" 3 K ", 3000)],
)
def test_tokens_are_counted_in_thousands_or_powers_of_1024(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize(
    "name, kind, chips", [("v5e-16", "v5e", 16), ("v5p-16", "v5p", 8), ("V6E-4", "v6e", 4), ("2xa800", "a800", 2)]
)
def test_machines_by_name(name, kind, chips):
    found = Topology.parse(name)
    assert (found.kind, found.chips) == (kind, chips)
    if found.is_tpu:
        assert math.prod(map(int, found.grid.split("x"))) == chips


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tokens", "many"], "--tokens 'many' is no number of tokens"),
        (["--tokens", "0"], "--tokens '0' is no number of tokens"),
        (["--train_tokens=-4K"], "--train_tokens '-4K' is no number"),
        (["--topology", "v7-16"], "--topology 'v7-16' is no machine known here: write KIND-NUMBER with a TPU"),
        (["--topology", "h100"], "is no machine known here"),
        (["--topology", "16xv5e"], "is no machine known here"),
        (["--topology", "v5e-7"], "v5e comes in slices of 4, 8, 16, 32, 64, 128, 256."),
        (["--topology", "v5p-4"], "v5p comes in slices of 8, 16, 32, 64, 128, 256, 512 (TensorCores, two a chip)."),
        (["--topology", "0xh100"], "give 1 to 4096 GPUs"),
        (["--mesh", "memory=3"], "has 15 devices and the machine 16: choose sizes whose product is 16"),
        (["--mesh", "rows=2"], "--mesh 'rows=2': write sizes of data, memory and model"),
        (["--mesh", "model=0"], "--mesh 'model=0': write sizes"),
        (["--mesh", "model=16"], "mesh.model 16 does not divide num_kv_heads 8: choose a divisor of it."),
        (["--mesh", "data=16", "--batch", "3"], "mesh.data 16 does not divide batch 3: choose a multiple of it."),
        (["--programs", "train", "--train_batch", "9"], "mesh.data 16 does not divide train_batch 9"),
        (["--keys", "fp8"], "--keys 'fp8': write bfloat16 or int8."),
        (["--content", "tape"], "--content 'tape': write a dtype"),
        (["--content", "host,disk"], "--content 'host,disk': write a dtype"),
        (["--programs", "question,dream"], "--programs 'dream': choose from question, decode, encode, train."),
        (["--model", "gpt"], "--model 'gpt' is neither a preset (qwen3_0_6b, qwen3_4b, small, tiny) nor a folder"),
        (["--row_tokens", "100"], "row_tokens 100 is no multiple of the model's chunk size 64."),
        (["--batch", "0"], "batch must be at least 1, got 0."),
        (["--rows", "-1"], "rows must be at least 1, got -1."),
        (["--rows", "few"], "argument --rows: invalid int value: 'few' (--help lists flags)."),
        (["--speed"], "unrecognized arguments: --speed (--help lists flags)."),
    ],
)
def test_bad_input_is_one_sentence_before_anything_compiles(flags, sentence, compiles, capsys, monkeypatch):
    # A mesh is all that is made of a machine before the checks, so stand-ins serve for its chips.
    monkeypatch.setattr(Topology, "mesh", lambda self, config: _abstract(config))
    assert main(flags) == 1
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1 and not out and not compiles


def _abstract(config):
    return jax.sharding.AbstractMesh((config.data, config.memory, config.model), ("data", "memory", "model"))


def test_without_the_compiler_one_sentence_says_how_to_install_it(monkeypatch, capsys, compiles):
    topologies._devices.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--topology", "v5e-16"]) == 1
    assert capsys.readouterr().err == (
        "msa_jax.plan: the compiler for TPUs, libtpu, is not installed: `make tpu` adds it to .venv.\n"
    )


def test_number_of_parameters():
    assert estimate.parameters(MSAConfig.preset("qwen3_4b")) == PARAMETERS == 4_258_397_696
    all_else = LayerSpec(o_bias=True, mlp_bias=True, post_norms=True)
    specs = (LayerSpec(), LayerSpec(qk_norm=False, qkv_bias=True), all_else)
    config = MSAConfig.preset("tiny", router_bias=True, tie_embeddings=False, layer_specs=specs)
    state = nnx.state(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    assert estimate.parameters(config) == sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "name, flags, chip, host",
    [
        ("8xh100", [], (2 * PARAMETERS + 2 * VECTORS + 4 * VECTORS) / 8, 0),
        # Content in int8 has a float32 scale for each chunk and head of K and of V.
        ("2xa800", ["--content", "int8"], (2 * PARAMETERS + 2 * VECTORS + 2 * VECTORS + 8 * VECTORS / 128) / 2, 0),
        ("1xh200", ["--keys", "int8", "--content", "int8"],
         2 * PARAMETERS + 3 * VECTORS + 8 * VECTORS / 128 + 4 * 18 * PLACES, 0),
        ("2xh100", ["--keys", "int8", "--content", "host"],
         (2 * PARAMETERS + VECTORS + 4 * 18 * PLACES) / 2, 4 * VECTORS / 2),
        ("8xh100", ["--keys", "int8", "--content", "disk,int8", "--mesh", "data=2,memory=4"],
         2 * PARAMETERS + (VECTORS + 8 * VECTORS / 128 + 4 * 18 * PLACES) / 4, 0),
    ],
)  # fmt: skip
def test_sizes_on_gpus_by_hand(name, flags, chip, host, capsys):
    assert main(["--topology", name, "--programs", "question", "--json", *flags]) in (0, 3)
    out = capsys.readouterr().out
    found = json.loads(out)["programs"][0]["usage"]
    # Of 8 questions the cache of 1,024 tokens, spread by heads. Layout, prefix and tokens are 9 MiB at most; norms are
    # on every chip.
    model = json.loads(out)["programs"][0]["mesh"]["model"]
    assert found["arguments"] == pytest.approx((chip + 36 * 4 * 8 * 1024 * 1024 / model) / GIB, abs=0.012)
    assert found["host"] == pytest.approx(host / GIB, abs=0.001)
    assert found["by"] == "arithmetic" and found["needed"] == pytest.approx(
        found["arguments"] + found["temporaries"], abs=0.002
    )


def test_the_state_of_training_is_spread_over_all_chips():
    config, sizes, mesh = MSAConfig.preset("qwen3_4b"), Sizes(), MeshConfig(data=8, fsdp=True)
    program = programs.train(config, Topology.parse("8xh100").mesh(mesh), sizes, mesh)
    # Parameters and two moments in float32; norms are whole on every chip.
    assert measure.arguments(program)[0] == pytest.approx(12 * PARAMETERS / 8 / GIB, abs=0.01)


@pytest.mark.parametrize(
    "name, bank",
    [
        ("8xh100", Bank()),
        ("1xh200", Bank(content="int8")),
        ("2xa800", Bank(content="int8")),
        ("1xh100", Bank(keys="int8", tier="host")),
    ],
)
def test_the_first_bank_that_fits_is_chosen(name, bank, compiles):
    topology, config = Topology.parse(name), MSAConfig.preset("qwen3_4b")
    (row,) = choose.plan(config, topology, Sizes(), ["question"], settings.BANKS)
    assert row.fits and row.how == str(bank)
    for worse in settings.BANKS[: settings.BANKS.index(bank)]:
        assert not choose.plan(config, topology, Sizes(), ["question"], [worse])[0].fits


@needs_libtpu
def test_what_the_compiler_refuses_is_tried_smaller(compiles):
    too_large = iter([True, False, False])
    compiles.answer = lambda program: Usage(needed=math.inf if next(too_large, False) else 1.0, host=0.0)
    topology, config = Topology.parse("v5e-4"), MSAConfig.preset("tiny")
    rows = choose.plan(config, topology, Sizes(tokens=10**6), ["decode", "question"], settings.BANKS)
    # Both programs share the bank, so both were compiled again.
    assert [row.program for row in rows] == ["question", "decode"] and all(row.fits for row in rows)
    assert {row.how for row in rows} == {str(settings.BANKS[1])} and len(compiles) == 4
    compiles.clear()
    compiles.answer = lambda program: Usage(needed=20.0, host=0.0)
    (row,) = choose.plan(config, topology, Sizes(), ["encode"], settings.BANKS)
    assert not row.fits and row.how.startswith("1 rows") and len(compiles) == 4
    assert "NO" in report.table(topology, [row]) and "20.00" in report.table(topology, [row])


@needs_libtpu
def test_what_shapes_rule_out_is_not_compiled(compiles):
    (row,) = choose.plan(
        MSAConfig.preset("qwen3_4b"), Topology.parse("v5e-4"), Sizes(tokens=10**9), ["question"], [Bank()]
    )
    assert not row.fits and row.usage.by == "arithmetic" and not compiles


@needs_libtpu
def test_a_mesh_that_the_chips_do_not_form_is_one_sentence(capsys, compiles):
    assert main(["--topology", "v6e-16", "--mesh", "memory=2,model=8"]) == 1
    assert "does not lie on the grid of chips of v6e-16, 4x4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys, content, banks",
    [
        (None, None, settings.BANKS),
        ("int8", "int8,host", (Bank(keys="int8", content="int8", tier="host"),)),
        ("bfloat16", "disk", (Bank(tier="disk"),)),
        (None, "host", tuple(b for b in settings.BANKS if b.tier == "host")),
    ],
)
def test_flags_narrow_the_choice_of_banks(keys, content, banks):
    assert parse_banks(keys, content) == banks


def test_a_mesh_takes_what_is_left_for_data():
    assert parse_mesh("memory=4, model=2", 16) == MeshConfig(data=2, memory=4, model=2)
    with pytest.raises(ConfigError):
        parse_mesh("memory=4,memory=4", 16)


@needs_libtpu
@pytest.mark.parametrize("tier", ["device", "host"])
def test_the_question_step_compiles_over_four_chips(tier):
    config = MSAConfig.preset("tiny", head_dim=128, vocab_size=512)
    topology, mesh = Topology.parse("v5e-4"), MeshConfig(data=1, memory=2, model=2)
    sizes = Sizes(tokens=2**19, batch=3, longest_tokens=256)
    program = programs.question(config, topology.mesh(mesh), Bank(tier=tier), sizes)
    usage, (chip, host) = measure.compiled(program), measure.arguments(program)
    # 32,768 chunks, 2 layers of 256 bfloat16: keys 8 MiB and content 16 MiB a chip.
    assert host == usage.host == (16 / 1024 if tier == "host" else 0)
    assert chip > (8 if tier == "host" else 24) / 1024
    # The compiler pads to tiles, and copies no layer of the bank, 4 MiB of keys and 8 of content.
    assert chip <= usage.arguments < 1.1 * chip and usage.temporaries < 8 / 1024
    # Caches are written in place.
    assert usage.alias > 0
    assert usage.needed == pytest.approx(usage.arguments + usage.temporaries + usage.output - usage.alias)


@needs_libtpu
def test_a_plan_from_the_command_line(capsys):
    flags = ["--model", "tiny", "--tokens", "1M", "--topology", "v5e-4", "--programs", "decode,encode", "--rows", "1"]
    assert main([*flags, "--batch", "2", "--row_tokens", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["program"] for p in found["programs"]] == ["decode", "encode"]
    assert all(p["fits"] and p["usage"]["by"] == "compiler" for p in found["programs"])
    decode = found["programs"][0]["usage"]
    # The cache is written in place.
    assert decode["alias"] > 0 and decode["needed"] < decode["arguments"] + decode["temporaries"] + decode["output"]
