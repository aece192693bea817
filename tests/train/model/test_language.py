"""Language models: MiniCPM as a Granite, the bias of Phi's head, and what stands in for a tokenizer in a rehearsal."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from toys import word_tokenizer
from transformers import AutoModel

from train.config import Model
from train.data.own_template import read_own_template
from train.errors import UsageError
from train.model.compose import compose, place_head_bias
from train.model.language import is_tiny, load_lm, load_tokenizer, room_for, tiny_tokenizer
from train.model.published import CONFIGS, known_words, locate, read_config, shipped

MINICPM = {
    "model_type": "minicpm",
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},  # remote code, which is never run
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def minicpm_state(config):
    """Weights under openbmb's names: no head, as it is the embedding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    width, inner = config["hidden_size"], config["intermediate_size"]
    state = {"model.embed_tokens.weight": draw(config["vocab_size"], width), "model.norm.weight": 1 + draw(width)}
    for i in range(config["num_hidden_layers"]):
        for letter in "qkvo":
            state[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = draw(width, width)
        state[f"model.layers.{i}.mlp.gate_proj.weight"] = draw(inner, width)
        state[f"model.layers.{i}.mlp.up_proj.weight"] = draw(inner, width)
        state[f"model.layers.{i}.mlp.down_proj.weight"] = draw(width, inner)
        state[f"model.layers.{i}.input_layernorm.weight"] = 1 + draw(width)
        state[f"model.layers.{i}.post_attention_layernorm.weight"] = 1 + draw(width)
    return state


def slow_minicpm(state, config, embeds_ld):
    """MiniCPM's forward pass (arXiv 2404.06395, §4.1) on embeddings, one head and one position at a time."""
    width, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head = width // heads
    scale = config["scale_depth"] / math.sqrt(layers)

    def norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"])

    def rotate(x, position):
        half = head // 2
        angles = position / 10_000 ** (torch.arange(half, dtype=torch.float64) * 2 / head)
        first, second = x[:half], x[half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    x = embeds_ld * config["scale_emb"]
    for i in range(layers):
        layer = {n.removeprefix(f"model.layers.{i}."): t for n, t in state.items() if f".layers.{i}." in n}
        y = norm(x, layer["input_layernorm.weight"])
        q, k, v = (y @ layer[f"self_attn.{letter}_proj.weight"].T for letter in "qkv")
        mixed = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * head, (h + 1) * head)
            keys = torch.stack([rotate(k[t, part], t) for t in range(len(x))])
            for t in range(len(x)):
                weights = torch.softmax(keys[: t + 1] @ rotate(q[t, part], t) / math.sqrt(head), 0)
                mixed[t, part] = weights @ v[: t + 1, part]
        x = x + scale * (mixed @ layer["self_attn.o_proj.weight"].T)
        y = norm(x, layer["post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
        x = x + scale * (gated @ layer["mlp.down_proj.weight"].T)
    x = norm(x, state["model.norm.weight"]) / (width / config["dim_model_base"])
    return x @ state["model.embed_tokens.weight"].T


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minicpm")
    (folder / "config.json").write_text(json.dumps(MINICPM))
    save_file(minicpm_state(MINICPM), folder / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer().save_pretrained(folder)
    return folder


def test_minicpm_runs_as_a_granite(minicpm):
    options = Model(lm=str(minicpm))
    lm = load_lm(options, load_tokenizer(options), torch.float32)
    assert type(lm).__name__ == "GraniteForCausalLM" and lm.config.tie_word_embeddings
    state = {name: tensor.double() for name, tensor in minicpm_state(MINICPM).items()}
    ids = torch.tensor([3, 50, 7, 7, 96, 12])
    expected = slow_minicpm(state, MINICPM, state["model.embed_tokens.weight"][ids])
    with torch.no_grad():
        torch.testing.assert_close(lm(ids[None]).logits[0], expected.float(), rtol=0, atol=1e-4)


def test_minicpm_in_the_llava_class_scales_images_and_logits_as_its_own(minicpm, world):
    """Bunny multiplies the merged embeddings, image features among them, and divides the logits."""
    composed = compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(minicpm), feature_strategy="full"))
    ids = torch.tensor([[4, *[composed.image_id] * 5, 9, 11]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inner = composed.model.model
    with torch.no_grad():
        served = composed.model(input_ids=ids, pixel_values=pixels).logits[0]
        hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        embeds = inner.language_model.embed_tokens.weight[ids[0]].double()
        embeds[1:6] = inner.multi_modal_projector(hidden)[0].double()
    state = {name: tensor.double() for name, tensor in minicpm_state(MINICPM).items()}
    torch.testing.assert_close(served, slow_minicpm(state, MINICPM, embeds).float(), rtol=0, atol=1e-4)


def test_minicpms_published_multipliers():
    config = read_config("openbmb/MiniCPM-2B-history", "model.lm", described=True)
    assert (config.model_type, config.embedding_multiplier, config.logits_scaling) == ("granite", 12.0, 9.0)
    assert config.residual_multiplier == pytest.approx(1.4 / math.sqrt(40))
    assert config.attention_multiplier == pytest.approx(1 / math.sqrt(64))


@pytest.mark.parametrize("length", [16, 17])
def test_minicpm4_turns_by_its_own_table(length, minicpm, tmp_path):
    """openbmb's modeling_minicpm.py: frequencies over the factors of a length, cosine and sine times one number."""
    short, long = [0.5 + 0.25 * i for i in range(8)], [1.0 + i for i in range(8)]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    values = {**MINICPM, "rope_scaling": {**scaling, "original_max_position_embeddings": 16}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    rotary = AutoModel.from_config(read_config(str(tmp_path), "model.lm")).rotary_emb
    cos, sin = rotary(torch.zeros(1, length, 48), torch.arange(length)[None])
    factors = torch.tensor(long if length > 16 else short)
    angles = torch.outer(torch.arange(length) / 1.0, 1 / (factors * 10_000 ** (torch.arange(8) / 8)))
    grown = math.sqrt(1 + math.log(64 / 16) / math.log(16))
    torch.testing.assert_close(cos[0, :, :8], grown * angles.cos(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin[0, :, :8], grown * angles.sin(), rtol=1e-5, atol=1e-5)


# ---- the bias of Phi's head ------------------------------------------------------------------------------------------


def phi(seed=0, **sizes):
    import transformers as tf

    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, **sizes}
    lm = tf.PhiForCausalLM(tf.PhiConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return lm


@pytest.mark.parametrize(("how", "kept"), [("fold", True), ("drop", False)])
def test_the_bias_of_phis_head_is_kept_unless_dropped(tmp_path, world, how, kept):
    lm = phi()
    lm.save_pretrained(tmp_path / "phi")
    word_tokenizer().save_pretrained(tmp_path / "phi")
    names = {"tower": f"local-dir:{world / 'clip'}", "lm": str(tmp_path / "phi"), "feature_strategy": "full"}
    composed = compose(Model(**names, lm_head_bias=how))
    assert composed.model.lm_head.bias is None
    ids = torch.randint(4, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = composed.model(input_ids=ids).logits, lm(ids).logits
    theirs = theirs if kept else theirs - lm.lm_head.bias
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert compose(Model(**names)).fingerprint == compose(Model(**names, lm_head_bias="fold")).fingerprint


def test_the_folded_bias_survives_bf16(world, tmp_path):
    """The error of a bf16 head with the bias inside is that of a bf16 head without one."""
    lm = phi(hidden_size=512)
    ids = torch.randint(4, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    lm.save_pretrained(tmp_path / "phi")
    word_tokenizer().save_pretrained(tmp_path / "phi")
    composed = compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(tmp_path / "phi")))
    with torch.no_grad():
        exact = lm(ids).logits
        usual = (lm.bfloat16()(ids).logits.float() - exact).abs().mean()
        folded = (composed.model.bfloat16()(input_ids=ids).logits.float() - exact).abs().mean()
    assert folded < 1.5 * usual


@pytest.mark.parametrize("change", [{}, {"image_token": "<picture>"}, {"lm_weights": "fresh"}, {"shrink": "tiny"}])
def test_weights_are_known_again_in_any_dtype(world, tmp_path, change):
    """What is trained in bf16 is exported from fp32: neither a fold, nor added rows, nor a draw may tell them apart."""
    phi(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "phi")
    word_tokenizer().save_pretrained(tmp_path / "phi")
    options = Model(tower=f"local-dir:{world / 'clip'}", lm=str(tmp_path / "phi"), **change)
    half, first = compose(options, torch.bfloat16), compose(options)
    torch.manual_seed(5)
    again = compose(options)
    assert half.fingerprint == first.fingerprint == again.fingerprint
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


def test_a_bias_that_cannot_be_folded_is_not_lost_silently(world, caplog):
    composed = compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(world / "lm")))
    before = composed.model.lm_head.weight.clone()
    place_head_bias(composed.model, torch.zeros(5), "fold")
    assert not caplog.messages
    place_head_bias(composed.model, torch.ones(5), "fold")
    assert ["is dropped" in message for message in caplog.messages] == [True]
    assert torch.equal(composed.model.lm_head.weight, before)


def test_a_small_weight_of_the_norm_does_not_spoil_the_fold(world, tmp_path):
    lm = phi(hidden_size=512)
    with torch.no_grad():
        lm.model.final_layernorm.weight[3] = 2e-4
    lm.save_pretrained(tmp_path / "phi")
    word_tokenizer().save_pretrained(tmp_path / "phi")
    composed = compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(tmp_path / "phi")))
    ids = torch.randint(4, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(composed.model(input_ids=ids).logits, lm(ids).logits, rtol=0, atol=1e-3)


# ---- descriptions and rehearsals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(CONFIGS.glob("*--*")), ids=lambda folder: folder.name)
def test_shipped_facts_can_be_read(folder):
    source = folder.name.replace("--", "/")
    assert shipped(source) == shipped(f"{source}@main") == folder
    config = read_config(source, "model.lm", described=True)
    assert hasattr(config, "vocab_size") == (known_words(source) is not None)
    words = known_words(source)
    assert words is None or config.vocab_size >= words.size > 30_000


def test_a_revision_is_named_behind_the_id(tmp_path):
    assert locate("a/b") == {"pretrained_model_name_or_path": "a/b"}
    assert locate("a/b@c") == {"pretrained_model_name_or_path": "a/b", "revision": "c"}
    (tmp_path / "x@y").mkdir()
    assert locate(str(tmp_path / "x@y")) == {"pretrained_model_name_or_path": str(tmp_path / "x@y")}


@pytest.mark.parametrize("source", ["microsoft/phi-2", "google/gemma-2b-it", "lmsys/vicuna-7b-v1.5"])
def test_a_rehearsals_tokenizer_begins_and_ends_as_the_real_one(source, tmp_path):
    words = known_words(source)
    tokenizer = tiny_tokenizer(words, "<image>")
    tokenizer.save_pretrained(tmp_path)
    text = "Grüße, 世界 \U0001f600\n two  spaces"
    for one in (tokenizer, load_tokenizer(Model(lm=str(tmp_path)))):
        ids = one(text)["input_ids"]
        assert (one.convert_ids_to_tokens(ids[0]) == words.bos) == bool(words.bos)
        assert one.decode(ids, skip_special_tokens=True) == text
        assert one.eos_token == words.eos and is_tiny(one)


def test_only_a_rehearsal_makes_a_tokenizer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    made = load_tokenizer(Model(lm="microsoft/phi-2", shrink="tiny"))
    assert is_tiny(made) and read_own_template(made).end == "<|im_end|>", "template = 'chat' can be rehearsed, too"
    for options in (Model(lm="microsoft/phi-2"), Model(lm="some/other", shrink="tiny")):
        with pytest.raises(UsageError, match="model.tokenizer"):
            load_tokenizer(options)


def test_room_for_the_image_token():
    assert [room_for(i, 64) for i in (0, 63, 64, 128)] == [64, 64, 128, 192]
    assert [room_for(i, 97) for i in (96, 97)] == [97, 98]


def test_a_sentencepiece_model_is_enough(tmp_path):
    """Vicuna is published with tokenizer.model alone: tokens are SentencePiece's, and an export needs it no more."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"the {a} {b} is near the {c}" for a in ("red", "big") for b in ("cat", "square") for c in ("door", "sea")]
    model = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_prefix=str(model.with_suffix("")),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as Llama's was trained
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    words = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**words, "unk_token": "<unk>", "legacy": False}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    tokenizer = load_tokenizer(Model(lm=str(tmp_path)))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ("the red cat", "USER: is it\nred?  ASSISTANT:", "Grüße 世界"):
        assert tokenizer(text)["input_ids"] == [theirs.bos_id(), *theirs.encode(text)]
    tokenizer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("token", ["<unk>", "<eos>", "<pad>"])
def test_the_image_token_stands_for_images_alone(world, token):
    with pytest.raises(UsageError, match="already means something else"):
        compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(world / "lm"), image_token=token))
