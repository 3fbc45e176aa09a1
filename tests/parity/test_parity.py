"""`python -m msa_jax.parity` on recordings of the published implementation, whole and damaged."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msa_jax.checkpoints.published import published_config
from msa_jax.config import MSAConfig
from msa_jax.errors import DataError
from msa_jax.parity.__main__ import check, main
from msa_jax.parity.recording import document_chunks, pack, take
from msa_jax.parity.report import Report
from msa_jax.parity.training import split_samples


@pytest.fixture
def copy_of(test_data, tmp_path):
    def copy(name):
        source = test_data / "goldens" / name
        if not source.is_dir():
            pytest.skip(f"no recording {name} in the test data")
        return shutil.copytree(source, tmp_path / name)

    return copy


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def nudge(array, place=(0, 0, 0)):
    array[place] += 1e-3


def failures(text):
    return re.findall(r"^  FAIL.{34}(\S+(?: \S+)?)", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["train_mha", "infer_mha"])
def test_agrees_with_the_published_implementation(copy_of, capsys, name):
    assert main([str(copy_of(name))]) == 0
    printed = capsys.readouterr().out
    assert not failures(printed)
    assert "logits" in printed and "passed" in printed.splitlines()[-1]
    expected = "grad model.layers.5.self_attn.router_q_proj.0.weight" if "train" in name else "decode/logits"
    assert expected in printed


@pytest.mark.slow  # a minute each in the interpreter; tests/kernels runs every kernel by default
@pytest.mark.parametrize(
    "name, implementation",
    [
        ("train_gqa", "tpu"), ("infer_gqa", "tpu"), ("train_gqa", "gpu"), ("infer_gqa", "gpu"),
    ],
)  # fmt: skip
def test_agrees_with_the_published_implementation_through_the_kernels(copy_of, capsys, name, implementation):
    assert main([str(copy_of(name)), "--implementation", implementation]) == 0
    assert not failures(capsys.readouterr().out)


def spread_columns(scores, first):
    """Scores of documents 1, 2, ... as those of 2, 4, ...; `first` is the number of the first column."""
    wide = np.full((len(scores), 2 * (scores.shape[1] - 1 + first) + 1 - first), -np.inf, scores.dtype)
    wide[:, first::2] = scores
    return wide


def test_names_exactly_what_differs_in_training(copy_of, capsys):
    folder = copy_of("train_gqa")
    io = read(folder / "io.npz")
    # The same step in another guise: samples in reverse order, one padded on the left, documents 2, 4, ...
    for name, value in io.items():
        if name.startswith("doc_scores"):
            value = spread_columns(value, 0)
        else:
            pad = [(0, 0), (0, 3)] + [(0, 0)] * (value.ndim - 2)
            value = np.pad(value, pad, constant_values=-100 if name == "labels" else 0)
            value[0] = np.roll(value[0], 3, axis=0)
        io[name] = value[::-1].copy()
    io["doc_ids"] = np.where(io["doc_ids"] > 0, 2 * io["doc_ids"], io["doc_ids"])
    scalars = json.loads((folder / "scalars.json").read_text())
    scalars["aux_labels"].reverse()
    gradients = read(folder / "grads.npz")

    # What is to be found.
    nudge(io["hidden_3"], (1, 8, 5))  # a document's token
    nudge(io["hidden_2"], (1, 0, 0))  # padding, which means nothing
    io["logits"][0, 7] = np.nan
    io["doc_scores_3"][0, 6] = -np.inf
    scalars["scalars"]["INFONCE_FOCAL"]["aux_loss"] += 1e-3
    scalars["scalars"]["INFONCE"]["recall"]["recall@5"] -= 0.25
    gradient = "model.layers.3.mlp.down_proj.weight"
    gradients[gradient] *= 1.001
    del gradients["model.layers.2.self_attn.router_k_proj.0.weight"]
    gradients["model.layers.9.mlp.down_proj.weight"] = np.ones(3, np.float32)

    np.savez(folder / "io.npz", **io)
    np.savez(folder / "grads.npz", **gradients)
    (folder / "scalars.json").write_text(json.dumps(scalars))
    assert main([str(folder)]) == 1
    assert failures(capsys.readouterr().out) == [
        "hidden_3", "logits", "doc_scores_3", "INFONCE recall@5", "INFONCE_FOCAL aux_loss",
        "grad model.layers.2.self_attn.router_k_proj.0.weight",
        f"grad {gradient}", "grad model.layers.9.mlp.down_proj.weight",
    ]  # fmt: skip


def test_names_exactly_what_differs_in_inference(copy_of, capsys):
    folder = copy_of("infer_gqa")
    io = read(folder / "io.npz")
    # The same questions in another guise: padded on the right, documents 2, 4, ...
    left = np.argmax(io["query/attention_mask"][1])
    assert left > 0
    for name, value in io.items():
        if name.startswith("query/doc_scores"):
            io[name] = spread_columns(value, 1)
        elif name.startswith("query/top_docs") or name == "bank/chunk_doc_ids":
            io[name] = 2 * value
        elif name == "docs/doc_ids":
            io[name] = np.where(value > 0, 2 * value, value)
        elif name.startswith("query/") and "top_scores" not in name:
            value[1] = np.roll(value[1], -left, axis=0)

    nudge(io["template/v_1"])
    nudge(io["bank/k_3"])
    io["query/top_docs_2"][1] = io["query/top_docs_2"][1, ::-1].copy()
    nudge(io["decode/logits"], (1, -1, 0))
    np.savez(folder / "io.npz", **io)
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert failures(printed) == ["template/v_1", "bank/k_3", "query/top_docs_2", "decode/logits"]
    assert "2 of 4 differ" in printed


@pytest.mark.slow
def test_one_weight_matters(copy_of):
    folder = copy_of("infer_gqa")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.self_attn.router_k_proj.0.weight"][5, 7] += 0.05
    save_file(tensors, folder / "model.safetensors")
    wrong = {row.name for row in check(str(folder)).rows if not row.passed}
    assert {"bank/router_k_3", "query/doc_scores_3", "query/top_scores_3"} <= wrong
    assert not wrong & {"bank/k_3", "query/hidden_3", "query/doc_scores_2"}


@pytest.fixture
def bare(tmp_path):
    """A folder with a config and nothing else."""
    config = published_config(MSAConfig(num_layers=2, chunk_size=4))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_unusable_folders_end_in_one_sentence(bare, tmp_path, capsys):
    def status(path):
        code = main([str(path)])
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return code, printed.err

    code, said = status(tmp_path / "nowhere")
    assert code == 2 and "nowhere: no such folder." in said
    code, said = status(bare)
    assert code == 2 and "io.npz: no such file" in said
    (bare / "io.npz").write_bytes(b"PK but no zip")
    code, said = status(bare)
    assert code == 2 and "io.npz: not a readable npz file" in said
    np.savez(bare / "io.npz", labels=np.array([{}], dtype=object))
    code, said = status(bare)
    assert code == 2 and "io.npz: not a readable npz file" in said  # and nothing was unpickled
    np.savez(bare / "io.npz", labels=np.zeros((1, 4)))
    code, said = status(bare)
    assert code == 2 and "holds neither model.safetensors nor" in said
    (bare / "config.json").write_text("[]")
    code, said = status(bare)
    assert code == 2 and "config.json: must hold a JSON object" in said


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        ("io.npz", {"input_ids": lambda x: x + 128}, "token ids must be below 128"),
        ("io.npz", {"doc_ids": lambda x: np.roll(x, 3, axis=1)}, "doc_ids of sample 0 must be a template"),
        ("io.npz", {"position_ids": lambda x: x[:, 1:]}, r"has shape \(2, 67\), must be \(2, 68\)"),
        ("scalars.json", {"aux_labels": [[1], [1, 0, 0, 1]]}, "has 1 for sample 0 with 5 documents"),
        ("scalars.json", {"aux_labels": None}, "aux_labels must have 2 lists"),
        ("scalars.json", {"scalars": {"INFONCE": {}}}, "scalars must give the numbers loss"),
        ("scalars.json", None, "scalars.json: no such file"),
        ("grads.npz", None, "grads.npz: no such file"),
    ],
)  # fmt: skip
def test_unusable_recordings(copy_of, file, damage, match):
    folder = copy_of("train_gqa")
    if damage is None:
        (folder / file).unlink()
    elif file == "io.npz":
        io = read(folder / file)
        np.savez(folder / file, **io | {name: change(io[name]) for name, change in damage.items()})
    else:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | damage))
    with pytest.raises(DataError, match=match):
        check(str(folder))


def test_samples_are_split_by_roles_wherever_padding_lies():
    roles = np.array([[-2, -2, 1, 1, 1, 3, 0, -2, -1, 9], [9, 9, 9, 2, 2, 2, 2, 2, 0, -1]])
    exists = roles < 9
    batch = split_samples(roles, exists, chunk_size=4, where="here")
    np.testing.assert_array_equal(batch.prefix, [[0, 1], [-1, -1]])
    np.testing.assert_array_equal(batch.active, [[6, 7, 8], [18, 19, -1]])
    assert batch.documents.shape == (3, 8)
    np.testing.assert_array_equal(
        batch.documents[:, :5], [[2, 3, 4, -1, -1], [5, -1, -1, -1, -1], [13, 14, 15, 16, 17]]
    )
    np.testing.assert_array_equal(batch.owner, [0, 0, 1])
    np.testing.assert_array_equal(batch.number, [1, 3, 2])
    np.testing.assert_array_equal(batch.visible, [[True, True, False], [False, False, True]])
    for wrong in ([0, 1, 1, 0], [1, 0, 1, 0], [0, 0, -1, -1]):
        with pytest.raises(
            DataError, match="doc_ids of sample 0 must be a template prefix, documents, then"
        ):
            split_samples(np.array([wrong]), np.ones((1, 4), bool), chunk_size=4, where="here")
    with pytest.raises(DataError, match="here: no token follows the documents"):
        split_samples(np.array([[-2, 1, 1]]), np.ones((1, 3), bool), chunk_size=4, where="here")


def test_rows_and_chunks_in_use():
    rows = pack([np.array([3, 4, 5]), np.array([7])], multiple=2)
    np.testing.assert_array_equal(rows, [[3, 4, 5, -1], [7, -1, -1, -1]])
    np.testing.assert_array_equal(take(np.arange(10) * 2, rows), [[6, 8, 10, 0], [14, 0, 0, 0]])
    index, owners = document_chunks([3, 1], row_chunks=2, chunk_size=2)
    np.testing.assert_array_equal(index, [0, 1, 2])
    np.testing.assert_array_equal(owners, [0, 0, 1])


def test_report_fails_on_nan_shapes_and_nothing():
    report = Report("t")
    assert not report.passed and "FAILED: nothing to compare" in str(report)
    report.activation("close", [1.0, 2.0], [1.0, 2.00001])
    report.relative("noise", [1e-9], [0.0], tolerance=1e-4, floor=1e-4)
    assert report.passed
    report.activation("nan", [np.nan], [1.0])
    report.activation("shape", np.zeros(3), np.zeros((3, 1)))
    report.relative("small", [1.001e-3], [1e-3], tolerance=1e-4, floor=1e-4)
    report.relative("nan", [np.nan], [1.0], tolerance=1e-4)
    assert [row.passed for row in report.rows] == [True, True, False, False, False, False]
    assert str(report).endswith("FAILED: nan, shape, small, nan")
