"""The peers of the bench: the same weights in other runtimes put out the same logits, or there is no race."""

import pytest
import torch
from model_directories import MAX_TOKENS, save_random_model

from tokprune_exp.bench import peers
from tokprune_exp.bench.peers import PlainTransformers, check_same_model, find_peers, with_onednn_products
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.model import load_model

FAMILIES = ["bert", "roberta", "distilbert"]


@pytest.fixture
def of_family(random_classifier, tiny_tokenizer, tmp_path):
    """Build a model of a family and a ragged batch that it reads."""

    def build(family="bert"):
        model, _ = load_model(save_random_model(tmp_path, random_classifier, tiny_tokenizer, family=family))
        texts = ["good film", "the plot is not very good", "dull"]
        batch = encode_texts(tiny_tokenizer, texts, MAX_TOKENS).collate(range(3))
        # each family pads with a token of its own
        batch.input_ids[~batch.valid] = model.encoder.shape.pad_token
        batch.input_ids[batch.valid & (batch.input_ids == model.encoder.shape.pad_token)] = 7
        return model, batch

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_puts_out_the_logits_of_our_unpruned_model(of_family, family):
    model, batch = of_family(family)
    plain = PlainTransformers(model)
    with torch.no_grad():
        theirs, ours = plain(batch), model(batch, "gathered", prune=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not plain.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_exported_peers_put_out_the_logits_of_our_unpruned_model(of_family, family, runtime, tmp_path):
    pytest.importorskip(runtime)
    model, batch = of_family(family)
    found, _ = find_peers([runtime], model, 1, tmp_path, "dense_fp32")
    assert found[0].key == f"{runtime}_fp32" and found[0].is_exact
    assert all(peer.side == "peer" and peer.reads == "sorted" for peer in found)
    differences = check_same_model(model, found, [batch])
    assert differences[f"{runtime}_fp32"] < 1e-4
    assert len(found) == len(differences)


def test_a_peer_that_is_not_installed_is_one_line(of_family, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    found, notes = find_peers(["transformers", "onnxruntime", "openvino"], of_family()[0], 1, tmp_path, "dense_fp32")
    assert {peer.key.partition("_")[0] for peer in found} == {"transformers"}
    assert notes[-2:] == [f"{name}: {peers.NOT_INSTALLED}" for name in ("onnxruntime", "openvino")]
    assert list(tmp_path.glob("*.onnx")) == []


@pytest.mark.parametrize("is_exact", [True, False])
def test_transformers_uses_onednn_only_where_it_is_exact(of_family, monkeypatch, is_exact):
    monkeypatch.setattr(peers, "use_fast_exact_float32", lambda: is_exact)
    found, notes = peers.transformers_peers(PlainTransformers(of_family()[0]), "dense_fp32")
    keys = [(peer.key, peer.reads) for peer in found]
    if is_exact:
        expected = [("transformers_onednn", "sorted"), ("transformers_onednn_unsorted", "unsorted")]
    else:
        expected = [("transformers_unsorted", "unsorted")]
    assert keys == [("transformers", "sorted"), *expected]
    assert bool(notes) != is_exact


def test_the_products_of_the_process_are_left_as_they_were(of_family):
    _, batch = of_family()
    before, seen = torch.get_float32_matmul_precision(), []
    with_onednn_products(lambda batch: seen.append(torch.get_float32_matmul_precision()) or torch.zeros(1, 1))(batch)
    assert seen == ["medium"]
    with pytest.raises(ZeroDivisionError):
        with_onednn_products(lambda batch: torch.zeros(1 // 0, 1))(batch)
    assert torch.get_float32_matmul_precision() == before


def test_another_model_is_not_raced_against(of_family, tmp_path):
    model, batch = of_family()
    found, _ = find_peers(["transformers"], model, 1, tmp_path, "dense_fp32")
    plain = found[0].forward
    plain.encoder.encoder.layer[0].output.dense.bias.data[0] += 1
    with pytest.raises(RuntimeError, match="puts out other logits"):
        check_same_model(model, found[:1], [batch])


def test_a_peer_of_lower_precision_may_differ_and_says_by_how_much(of_family):
    model, batch = of_family()
    with torch.no_grad():
        logits = model(batch, "gathered", prune=False).logits
    rough = peers._peer("int8", "int8", lambda batch: logits + 0.5, "int8", "dense_fp32")
    assert check_same_model(model, [rough], [batch])["int8"] == pytest.approx(0.5, abs=1e-4)
