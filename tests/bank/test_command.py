"""`python -m msa_jax.bank`: documents in and out as JSON lines, exit codes, damage found and named."""

import io
import json

import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import __main__ as command
from msa_jax.bank.jsonl import count_lines
from msa_jax.bank.store import MemoryStore
from msa_jax.checkpoints.pretrained import save_model
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import BankError
from tests.bank.test_ingest_and_load import TEXTS, encoder_of

LINES = [{"id": str(i), "text": text, "title": f"Title {i}"} for i, text in enumerate(TEXTS)]
LINES[2] |= {"namespace": "mine", "metadata": {"page": 7}}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command; its exit status, what it printed and what it said of errors."""
    monkeypatch.setattr(command, "_encoder", lambda options: encoder_of())

    def call(*arguments):
        status = command.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def bank(run, tmp_path):
    """A bank of all lines."""
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    assert run("create", tmp_path / "bank", "--workdir", "x")[0] == 0
    status, printed, _ = run("add", tmp_path / "bank", tmp_path / "in.jsonl", "--workdir", "x", "--json")
    assert status == 0 and json.loads(printed)["added"] == len(LINES)
    return tmp_path / "bank"


def lines(printed):
    return [json.loads(line) for line in printed.splitlines()]


def test_what_goes_in_comes_out(run, bank):
    exported = lines(run("export", bank)[1])
    empty = {"title": "", "namespace": "default", "metadata": {}}
    assert exported == [empty | line for line in LINES]
    assert lines(run("get", bank, "2", "--namespace", "mine", "--json")[1]) == [exported[2]]
    assert [d["id"] for d in lines(run("list", bank, "--namespace", "default")[1])] == ["0", "1", "3", "4"]
    assert [d["id"] for d in lines(run("list", bank, "--prefix", "4")[1])] == ["4"]


def test_changes_and_earlier_versions(run, bank, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"id": "1", "text": "changed"}'))
    assert run("update", bank, "-", "--workdir", "x")[0] == 0
    assert json.loads(run("delete", bank, "0", "4", "--json")[1]) == {"deleted": 2, "version": 4}
    assert [d["text"] for d in lines(run("export", bank)[1])] == [TEXTS[2], TEXTS[3], "changed"]
    assert [d["text"] for d in lines(run("export", bank, "--version", "2")[1])] == TEXTS
    stats = json.loads(run("stats", bank, "--json")[1])
    assert (stats["documents"], stats["rows"], stats["namespaces"]) == (3, 6, {"default": 2, "mine": 1})
    assert [v.split()[1] for v in stats["versions"]] == ["create", "add", "update", "delete"]
    assert json.loads(run("verify", bank, "--json")[1])["whole"] is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"id": "x"}', "line 2: needs an object with id and text"),
        ('{"id": "x", "text": "y", "body": "z"}', "line 2: needs an object"),
        ('{"id": 3, "text": "y"}', "line 2: id, text, title and namespace must be strings"),
        ('{"id": "x", "text": "y", "metadata": []}', "line 2: metadata must be an object"),
        ('{"id": "0", "text": "other"}', "'0' of namespace 'default' is there with another text"),
    ],
)
def test_a_bad_line_is_named_and_nothing_of_the_commit_is_written(run, bank, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"id": "new", "text": "fine"}\n' + line)
    status, _, said = run("add", bank, tmp_path / "bad.jsonl", "--workdir", "x", "--json")
    assert status == 1 and message in said and said.count("\n") == 1
    assert len(MemoryStore(bank)) == len(LINES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere"], "nowhere: no bank here"),
        (["get", "BANK", "9"], "no document '9' in namespace 'default'"),
        (["delete", "BANK", "0", "9"], "no document '9' in namespace 'default': nothing was changed"),
        (["export", "BANK", "--version", "9"], "no version 9"),
        (["add", "BANK", "missing.jsonl", "--workdir", "x"], "missing.jsonl: No such file"),
        (["create", "BANK", "--workdir", "x"], "there is a bank already"),
    ],
)
def test_refusals_are_one_sentence_and_exit_1(run, bank, arguments, message):
    status, printed, said = run(*[bank if a == "BANK" else a for a in arguments])
    assert status == 1 and printed == "" and message in said
    assert said.startswith("bank: ") and said.count("\n") == 1


def test_a_damaged_manifest_is_refused(bank):
    for path in bank.rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BankError, match="damaged or unreadable"):
        MemoryStore(bank)


def test_a_checkpoint_encodes(tmp_path, capsys):
    tokenizer = Tokenizer.train(TEXTS, vocab_size=340)
    config = MSAConfig.preset(
        "tiny",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        head_dim=4,
        mlp_size=8,
        num_layers=1,
        router_layers=(0,),
    )
    save_model(MSATransformer(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    bank, source = str(tmp_path / "bank"), str(tmp_path / "in.jsonl")
    assert command.main(["create", bank, "--checkpoint", str(tmp_path / "model")]) == 0
    for part in ("1/2", "2/2"):
        assert command.main(["add", bank, source, "--checkpoint", str(tmp_path / "model"), "--part", part]) == 0
    capsys.readouterr()
    assert command.main(["stats", bank, "--device", "h200", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["documents"] == len(LINES) and shown["on_device"]["needs"]["all int8"]["devices"] == 1
    assert shown["bytes"]["keys"]["float32"] == shown["chunks"] * 2 * 4 * 4
    assert command.main(["compact", bank, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == len(LINES)
    assert command.main(["add", bank, source, "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("bank: ")
    with pytest.raises(SystemExit):
        command.main(["add", bank, source, "--checkpoint", "x", "--part", "3/2"])


@pytest.mark.parametrize(("text", "lines"), [("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("\n\n", 2)])
def test_lines_are_counted(tmp_path, text, lines):
    (tmp_path / "file").write_text(text)
    assert count_lines(str(tmp_path / "file")) == lines
