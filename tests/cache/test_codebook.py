"""Codebook files: what is written is what is read, and every way of being wrong has its error."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from million_cache import codebook
from million_cache.card import CARD_NAME, EVALUATION_KEYS, MARK, model_card
from million_cache.codebook import CONFIG_NAME, TENSORS_NAME, Codebooks, LayerCodebooks, LayerReport, invert
from million_cache.config import PQConfig
from million_cache.models import fingerprint
from million_ops import layout_by_id
from tests.cache.tiny_models import tiny_llama, tiny_smollm3

CONFIG = PQConfig(k_subspace_dim=2, v_subspace_dim=4, frame_tokens=64)
H, D = 2, 32


def make_layer(seed: int, rotated: bool = True) -> LayerCodebooks:
    g = torch.Generator().manual_seed(seed)
    transform = torch.randn(H, D, D, generator=g)
    return LayerCodebooks(
        k_codebook=torch.randn(H, 256, D // 2, 2, generator=g).half(),
        v_codebook=torch.randn(H, 256, D // 4, 4, generator=g).half(),
        k_transform=transform,
        k_transform_inv=invert(transform),
        inv_freq=torch.rand(D // 2, generator=g) if rotated else None,
        rope_interleaved=False,
        frame_tokens=64 if rotated else 0,
    )


def make_report(seed: int) -> LayerReport:
    g = torch.Generator().manual_seed(seed)
    return LayerReport(*(torch.rand(H, s, generator=g) for s in (D // 2, D // 2, D // 4, D // 4)))


@pytest.fixture(scope="module")
def model_fingerprint():
    return fingerprint(tiny_llama())


@pytest.fixture
def books(model_fingerprint) -> Codebooks:
    layers = {0: make_layer(0), 1: make_layer(1, rotated=False)}
    return Codebooks(CONFIG, model_fingerprint, layers, {"text": "a test"}, {i: make_report(i) for i in layers})


@pytest.fixture
def saved(books, tmp_path):
    books.save_pretrained(tmp_path / "books")
    return tmp_path / "books"


def edit_header(directory, change) -> None:
    path = directory / CONFIG_NAME
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


def edit_tensors(directory, change) -> None:
    """Change the tensors and keep the checksum right, as a faulty writer would."""
    path = directory / TENSORS_NAME
    named = load_file(path)
    change(named)
    save_file(named, path, metadata={"format": codebook.FORMAT})
    edit_header(directory, lambda h: h.update(tensors_sha256=codebook._sha256(path)))


# -- round trip -----------------------------------------------------------------------------------------------------------


def test_round_trip(books, saved):
    again = Codebooks.from_pretrained(saved)
    assert (again.config, again.fingerprint, again.provenance) == (books.config, books.fingerprint, books.provenance)
    assert again.layers.keys() == books.layers.keys() and again.nbytes == books.nbytes
    for i, layer in books.layers.items():
        assert (again.layers[i].frame_tokens, again.layers[i].rope_interleaved) == (layer.frame_tokens, False)
        assert again.layers[i].tensors.keys() == layer.tensors.keys()
        for name, tensor in layer.tensors.items():
            assert torch.equal(again.layers[i].tensors[name], tensor)
        for name, tensor in vars(books.report[i]).items():
            assert torch.equal(getattr(again.report[i], name), tensor)


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
def test_whoever_may_read_one_file_may_read_the_other(saved):
    modes = {(saved / name).stat().st_mode & 0o777 for name in (CONFIG_NAME, TENSORS_NAME)}
    before = os.umask(0)
    os.umask(before)
    assert modes == {0o666 & ~before}


def test_layers_may_share_a_tensor(books, tmp_path):
    books.layers[1] = replace(books.layers[1], inv_freq=books.layers[0].inv_freq, frame_tokens=64)
    books.save_pretrained(tmp_path / "shared")
    assert torch.equal(Codebooks.from_pretrained(tmp_path / "shared").layers[1].inv_freq, books.layers[0].inv_freq)


def test_saved_beside_a_checkpoint(books, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    books.save_pretrained(tmp_path)
    books.save_pretrained(tmp_path)  # and over an older one
    assert sorted(os.listdir(tmp_path)) == sorted(["config.json", CONFIG_NAME, TENSORS_NAME])
    Codebooks.from_pretrained(tmp_path)


def test_compact_storage(books, tmp_path):
    """Small, close, consistent, and stored again without further loss."""
    books.layers[0].k_codebook[1, :, 3] *= 1000  # every channel has a range of its own
    books.layers[1].v_codebook[0, :, 2, 1] = 7.0  # even none
    books.save_pretrained(tmp_path / "full")
    books.save_pretrained(tmp_path / "compact", compact=True)
    sizes = [(tmp_path / x / TENSORS_NAME).stat().st_size for x in ("compact", "full")]
    assert sizes[0] < 0.5 * sizes[1]
    again = Codebooks.from_pretrained(tmp_path / "compact")
    for i, layer in books.layers.items():
        got = again.layers[i]
        for name in ("k_codebook", "v_codebook"):
            want, found = (getattr(x, name).double() for x in (layer, got))
            step = (want.amax(1) - want.amin(1)) / 255
            # Half a step, and the rounding to fp16 of what comes out.
            assert ((found - want).abs() <= 0.5 * step[:, None] + want.abs() / 1000).all()
        torch.testing.assert_close(got.k_transform, layer.k_transform, rtol=0, atol=2e-3)
        torch.testing.assert_close(
            got.k_transform @ got.k_transform_inv, torch.eye(D).expand(H, D, D), rtol=0, atol=1e-3
        )
        assert (got.inv_freq is None) == (layer.inv_freq is None) and got.frame_tokens == layer.frame_tokens
    assert (again.layers[1].v_codebook[0, :, 2, 1] == 7).all()
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / TENSORS_NAME).stat().st_size == sizes[0]  # stored as it was loaded
    twice = Codebooks.from_pretrained(tmp_path / "twice")
    for i, layer in again.layers.items():
        for name in ("k_codebook", "v_codebook", "k_transform"):
            torch.testing.assert_close(getattr(twice.layers[i], name), getattr(layer, name), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["k_codebook_offset", "v_codebook_scale", "k_transform_scale", "v_codebook"])
def test_compact_storage_with_a_tensor_missing(books, tmp_path, name):
    books.save_pretrained(tmp_path / "books", compact=True)
    edit_tensors(tmp_path / "books", lambda named: named.pop(f"layers.0.{name}"))
    with pytest.raises(ValueError, match=name):
        Codebooks.from_pretrained(tmp_path / "books")


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_an_inverse_that_fp16_does_not_hold_is_refused(books, size):
    books.layers[1].k_transform_inv.mul_(size)
    with pytest.raises(ValueError, match=r"k_transform_inv has heads with entries up to .*another scale"):
        books.layers[1].inverse_for(layout_by_id(2))
    assert books.layers[1].inverse_for(layout_by_id(1)) is books.layers[1].k_transform_inv


def test_compact_storage_refuses_what_it_would_spoil(books, tmp_path):
    books.layers[1].v_codebook[0, 17] = 3000.0
    with pytest.raises(ValueError, match=r"v_codebook: in .* channels a few centroids lie so far away .*3000.*in full"):
        books.save_pretrained(tmp_path / "books", compact=True)
    books.save_pretrained(tmp_path / "books", compact=False)
    assert Codebooks.from_pretrained(tmp_path / "books").layers[1].v_codebook[0, 17].eq(3000).all()


def test_compact_storage_of_a_singular_transform(books, tmp_path):
    books.layers[0].k_transform[0] = 1.0
    books.save_pretrained(tmp_path / "books", compact=True)
    with pytest.raises(ValueError, match="singular"):
        Codebooks.from_pretrained(tmp_path / "books")


def test_subfolder(books, tmp_path):
    books.save_pretrained(tmp_path / "model" / "4bit")
    assert Codebooks.from_pretrained(tmp_path / "model", subfolder="4bit").nbytes == books.nbytes


def test_properties(books):
    layer = books.layers[0]
    assert (layer.kv_heads, layer.head_dim) == (H, D)
    centroids = 2 * 2 * H * 256 * D
    assert books.nbytes == 2 * (centroids + 2 * H * D * D * 4) + D // 2 * 4


def test_caches_share_the_tensors_of_a_device(books):
    assert books.to("cpu")[0] is books.to(torch.device("cpu"))[0]
    assert books.to("cpu")[0].k_codebook is books.layers[0].k_codebook


# -- model card and hub ---------------------------------------------------------------------------------------------------


def metadata(text: str) -> dict:
    """The YAML of a card."""
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_card_says_what_they_are_and_whose(books, tmp_path):
    books.provenance = {"base_model": "org/model", "license": "mit", "text": "/home/me/text.txt", "tokens": 4096}
    books.save_pretrained(tmp_path / "books")
    text = (tmp_path / "books" / CARD_NAME).read_text()
    found = metadata(text)
    assert found["base_model"] == "org/model" and found["license"] == "mit" and "million" in found["tags"]
    assert "# 3-bit codebooks for the KV cache of org/model" in text
    assert "3 (keys 4, values 2)" in text and "| tokens | 4096 |" in text
    assert 'from_pretrained("org/model")' in text
    assert "/home" not in text
    energy = torch.cat([books.report[i].v_distortion.mean(1) / books.report[i].v_energy.mean(1) for i in books.layers])
    layer, head = divmod(int(energy.argmax()), H)
    assert f"{energy.mean():.4f} (worst: {energy.max():.4f}, layer {layer}, KV head {head})" in text


@pytest.mark.parametrize("name", ["/root/models/llama", "./org/model", "model", "", None, 7])
def test_card_gives_no_directory_as_the_base_model(books, name):
    books.provenance = {"model": name}
    assert "base_model" not in metadata(model_card(books))
    assert "KV cache of a llama model" in model_card(books)


def test_card_of_a_relative_directory(books):
    """Wherever the card is written: whether it is one was known at the calibration alone."""
    books.provenance = {"model": "org/model"}
    assert "base_model" not in metadata(model_card(books))


def test_a_directory_of_the_users_own(books, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    books.save_pretrained("~/books")
    assert (tmp_path / "books").is_dir() and Codebooks.from_pretrained("~/books").nbytes == books.nbytes


def test_card_says_how_they_were_calibrated(books):
    mixed = {
        "text": "/home/me/notes.txt + dataset:Salesforce/wikitext,wikitext-2-raw-v1 + dataset:/home/me/rows",
        "tokens": 4096,
    }
    tuned = {"finetune_steps": 24, "finetune_held_out_kl": [0.0078, 0.0062]}
    card = model_card(replace(books, provenance=mixed | tuned))
    assert (
        "| text | notes.txt + dataset:Salesforce/wikitext,wikitext-2-raw-v1 + dataset:rows |" in card
        and "/home" not in card
    )
    assert "| fine-tuning | 24 steps, KL on held-out text 0.00780 to 0.00620 |" in card
    assert "fine-tuning" not in model_card(replace(books, provenance=mixed))


def test_card_shows_a_recorded_evaluation(books):
    assert "KL(dense" not in model_card(books)
    books.report = {}
    assert "Distortion" not in model_card(books)
    books.provenance["evaluation"] = dict.fromkeys(EVALUATION_KEYS, 1) | {
        "kl": 0.01234,
        "text": "/a/b.txt",
        "context": 512,
    }
    text = model_card(books)
    assert "0.01234" in text and "1 contexts of 512 tokens of b.txt" in text


def test_a_card_of_ours_is_replaced_and_no_other(books, tmp_path):
    books.save_pretrained(tmp_path)
    books.provenance["tokens"] = 123
    books.save_pretrained(tmp_path)
    assert "123" in (tmp_path / CARD_NAME).read_text()
    (tmp_path / CARD_NAME).write_text("mine")
    books.save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == "mine"


class Hub:
    """`huggingface_hub.HfApi` at its boundary: what is asked of it, and the files that an upload would send."""

    def __init__(self, files=(), card: Path | None = None):
        self.files, self.card, self.calls, self.uploaded = set(files), card, [], {}

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("create_branch", repo_id, branch, exist_ok))

    def file_exists(self, repo_id, filename, *, revision):
        return filename in self.files

    def hf_hub_download(self, repo_id, filename, *, revision):
        assert filename == CARD_NAME
        return str(self.card)

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        self.calls.append(("upload_folder", options))
        names = [n for n in os.listdir(folder_path) if n not in (ignore_patterns or ())]
        self.uploaded = {n: (Path(folder_path) / n).read_bytes() for n in names}
        return "the commit"


def test_push_to_hub(books, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert (
        books.push_to_hub("books", private=True, token="secret", commit_message="Hello", revision="v2") == "the commit"
    )
    assert hub.calls[:3] == [
        ("token", "secret"),
        ("create_repo", "books", True, True),
        ("create_branch", "me/books", "v2", True),
    ]
    options = {
        "repo_id": "me/books",
        "commit_message": "Hello",
        "commit_description": None,
        "revision": "v2",
        "create_pr": False,
    }
    assert hub.calls[3] == ("upload_folder", options)
    for name, content in hub.uploaded.items():
        (tmp_path / name).write_bytes(content)
    again = Codebooks.from_pretrained(tmp_path)
    assert torch.equal(again.layers[1].v_codebook, books.layers[1].v_codebook)
    assert MARK in (tmp_path / CARD_NAME).read_text()


def test_push_to_a_checkpoint_keeps_its_card(books, monkeypatch):
    hub = Hub(files=["config.json", CARD_NAME])
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    books.push_to_hub("model", create_pr=True, revision="main")
    assert set(hub.uploaded) == {CONFIG_NAME, TENSORS_NAME}
    assert [c[0] for c in hub.calls] == ["token", "create_repo", "upload_folder"]  # a pull request needs no branch
    assert hub.calls[-1][1]["commit_message"] == "Upload million codebooks"


@pytest.mark.parametrize("ours", [True, False])
def test_push_replaces_no_card_of_others(books, monkeypatch, tmp_path, ours):
    card = tmp_path / "card"
    card.write_text(f"{MARK} old" if ours else "mine")
    hub = Hub(files=[CARD_NAME], card=card)
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    books.push_to_hub("books")
    assert (CARD_NAME in hub.uploaded) is ours


@pytest.mark.parametrize("compact, version", [(False, 1), (True, 2)])
def test_format_version_is_the_oldest_that_reads_it(books, tmp_path, compact, version):
    books.save_pretrained(tmp_path, compact=compact)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["format_version"] == version


# -- interruption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["save_file", "_sha256"])
def test_interrupted_saving_leaves_nothing(books, tmp_path, monkeypatch, existing, step):
    target = tmp_path / "books"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("{}")

    def interrupt(first, path=None, **kwargs):
        if step == "save_file":
            path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(codebook, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        books.save_pretrained(target)
    assert os.listdir(tmp_path) == (["books"] if existing else [])
    assert not existing or os.listdir(target) == ["config.json"]


def test_pair_of_two_savings_is_refused(books, saved, tmp_path):
    """What an interruption between the two renames over an older pair would leave."""
    books.layers[0].k_codebook[0, 0, 0, 0] += 1
    books.save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / TENSORS_NAME, saved / TENSORS_NAME)
    with pytest.raises(ValueError, match="not the tensor file"):
        Codebooks.from_pretrained(saved)


# -- what cannot be read --------------------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Codebooks.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Codebooks.from_pretrained("./nowhere")


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Codebooks.from_pretrained(saved)


def test_truncated_tensors(saved):
    path = saved / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        Codebooks.from_pretrained(saved)


def test_foreign_tensors(saved):
    save_file({"weight": torch.zeros(2)}, saved / TENSORS_NAME)
    with pytest.raises(ValueError, match="but not one of million-codebooks"):
        Codebooks.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "does not describe"), ('{"format": "gguf"}', "does not describe")]
)
def test_foreign_config(saved, text, message):
    (saved / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        Codebooks.from_pretrained(saved)


@pytest.mark.parametrize("version", [0, 4, None, "1"])
def test_unknown_format_version(saved, version):
    edit_header(saved, lambda h: h.update(format_version=version))
    with pytest.raises(ValueError, match="this release reads versions 1 to 3"):
        Codebooks.from_pretrained(saved)


def test_version_1_is_read(books, saved):
    """It had no word about storage."""
    edit_header(saved, lambda h: h.update(format_version=1) or h.pop("storage"))
    assert torch.equal(Codebooks.from_pretrained(saved).layers[0].k_codebook, books.layers[0].k_codebook)


def test_unknown_storage(saved):
    edit_header(saved, lambda h: h.update(storage="holographic"))
    with pytest.raises(ValueError, match="unknown storage 'holographic'"):
        Codebooks.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config", "fingerprint", "layers", "provenance"])
def test_missing_section(saved, name):
    edit_header(saved, lambda h: h.pop(name))
    with pytest.raises(ValueError, match=name):
        Codebooks.from_pretrained(saved)


@pytest.mark.parametrize("name", ["layers.0.k_codebook", "layers.1.k_transform_inv", "layers.0.v_energy"])
def test_missing_tensor(saved, name):
    edit_tensors(saved, lambda named: named.pop(name))
    with pytest.raises(ValueError, match=name.split(".")[2]):
        Codebooks.from_pretrained(saved)


def test_missing_layer(saved):
    edit_header(saved, lambda h: h["layers"].pop("1"))
    with pytest.raises(ValueError, match=r"needed for layers \[0, 1\], got \[0\]"):
        Codebooks.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_codebook", lambda t: t[:, :128]),
        ("k_codebook", lambda t: t.float()),
        ("v_codebook", lambda t: t[:1]),
        ("k_transform", lambda t: t[..., :8]),
        ("k_transform_inv", lambda t: t.double()),
        ("inv_freq", lambda t: t.half()),
        ("inv_freq", lambda t: torch.cat((t, t))),
        ("v_codebook", lambda t: t / 0),
    ],
)
def test_wrong_tensor(saved, name, change):
    def edit(named):
        named[f"layers.0.{name}"] = change(named[f"layers.0.{name}"]).contiguous()

    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match="layer 0: "):
        Codebooks.from_pretrained(saved)


def test_config_of_other_bits(saved):
    edit_header(saved, lambda h: h["config"].update(k_subspace_dim=4))
    with pytest.raises(ValueError, match=r"k_codebook must be \[2, 256, 8, 4\]"):
        Codebooks.from_pretrained(saved)


def test_frames_without_rotation(books):
    with pytest.raises(ValueError, match="frame_tokens must be 0"):
        replace(books, layers={**books.layers, 1: replace(books.layers[1], frame_tokens=64)})


def test_layers_of_another_model(books):
    with pytest.raises(ValueError, match="codebooks are needed for layers"):
        replace(books, layers={0: books.layers[0]})


def test_smollm3_layers_differ(tmp_path):
    model = tiny_smollm3()
    books = Codebooks(CONFIG, fingerprint(model), {0: make_layer(0), 1: make_layer(1, rotated=False)})
    books.save_pretrained(tmp_path / "x")
    again = Codebooks.from_pretrained(tmp_path / "x")
    assert again.layers[1].inv_freq is None and again.report == {}


@pytest.mark.parametrize("dim", [8, 256])
def test_invert(dim):
    x = torch.eye(dim, dtype=torch.float64) + torch.randn(3, dim, dim, dtype=torch.float64) * (0.3 / dim**0.5)
    torch.testing.assert_close(x @ invert(x), torch.eye(dim, dtype=torch.float64).expand(3, -1, -1))
    with pytest.raises(torch.linalg.LinAlgError):
        invert(torch.zeros(1, dim, dim))
