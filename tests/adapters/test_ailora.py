"""AILoRA: closed forms per card, agreement with peft's PiSSA, exact export, UNet and transformers models, every refusal."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, inputs, train, trainable, with_lora
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from valign.adapters import AILoRA, export_lora, initialize, save_peft_lora
from valign.adapters.ailora import split_start
from valign.adapters.factors import lora_layers
from valign.adapters.spectrum import exact_svd


def random_weight(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_the_start_is_the_best_or_the_least_part_of_the_weight(rows, columns, data):
    size = min(rows, columns)
    rank, scale = data.draw(st.integers(1, size)), data.draw(st.floats(0.1, 8))
    weight = random_weight(rows, columns, data.draw(st.integers(0, 99)))
    s = torch.linalg.svdvals(weight)
    for part, chosen, left in (("principal", s[:rank], s[rank:]), ("minor", s[size - rank :], s[: size - rank])):
        start = split_start(exact_svd(weight), rank, part=part, scale=scale)
        residual = weight - scale * start.up @ start.down
        assert_close(residual.square().sum(), left.square().sum(), rtol=1e-6, atol=1e-9)
        gram = torch.diag(chosen / scale)
        assert_close(start.up.T @ start.up, gram, rtol=1e-6, atol=1e-9)
        assert_close(start.down @ start.down.T, gram, rtol=1e-6, atol=1e-9)
        if part == "minor":
            assert int((torch.linalg.svdvals(residual) > 1e-8).sum()) == size - rank


def test_dead_directions_are_passed_over_with_a_warning():
    spectrum = exact_svd(torch.diag(torch.tensor([4.0, 3.0, 2.0, 0.0])))
    with pytest.warns(UserWarning, match="Of the weight, 1 singular values are zero"):
        start = split_start(spectrum, 2, part="minor")
    assert_close(start.up @ start.down, torch.diag(torch.tensor([0.0, 3.0, 2.0, 0.0])), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"split_start\.rank must be in \[1, 3\], to_v's own rank, got 4\. Lower the rank"):
        split_start(spectrum, 4, part="minor", module="to_v")


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ("to_q q_proj query q add_q_proj q_lin wq", "principal"),
        ("to_v v_proj value v add_v_proj v_lin wv", "minor"),
        ("to_k k_proj key to_out.0 fc1 vq to_q.0 my_v_proj", None),
    ],
)
def test_the_last_name_of_a_module_gives_its_role(names, part):
    assert {AILoRA().role(f"blocks.0.to_v.{name}") for name in names.split()} == {part}


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_function_is_kept_and_only_the_factors_train(preserve, rslora):
    base = Attention()
    before, weights = base(inputs()), {n: p.clone() for n, p in base.named_parameters()}
    model = with_lora(base, use_rslora=rslora)
    plain = sum(p.numel() for p in trainable(model).values())
    report = initialize(model, "ailora", preserve_base=preserve)
    assert_close(model(inputs()), before, rtol=0, atol=1e-5)
    assert report.roles == {"to_k": "lora", "to_q": "principal", "to_v": "minor"}
    assert (report.keeps_function, report.keeps_base) == (True, preserve)
    assert all("lora_A" in name or "lora_B" in name for name in trainable(model))
    assert report.trainable == sum(p.numel() for p in trainable(model).values()) == plain == 3 * (12 + 12) * 2 + 3 * (12 + 8)
    kept = all(torch.equal(layer.base_layer.weight, weights[f"{n}.weight"]) for n, layer in lora_layers(model, "default").items())
    assert kept is preserve
    if preserve:
        with model.disable_adapter():
            assert torch.equal(model(inputs()), before)


def test_both_factors_move_at_the_first_step():
    gradients = {}
    for name in ("lora", "ailora"):
        model = with_lora(targets=("to_q", "to_v"))
        if name == "ailora":
            initialize(model, name)
        model(inputs()).square().sum().backward()
        gradients[name] = {n: p.grad.norm().item() for n, p in trainable(model).items()}
    assert all(value > 1e-4 for value in gradients["ailora"].values())
    assert all(value == 0 for name, value in gradients["lora"].items() if "lora_A" in name)


def test_the_product_does_not_depend_on_alpha():
    deltas = []
    for alpha in (1, 24):
        model = with_lora(alpha=alpha)
        initialize(model, "ailora")
        deltas.append(model.base_model.model.to_v.get_delta_weight("default"))
    assert_close(*deltas)


def test_two_principal_halves_are_peft_pissa():
    ours, theirs = with_lora(targets=("to_q", "to_v")), None
    initialize(ours, "ailora", part_value="principal")
    theirs = get_peft_model(Attention(), LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights="pissa"))
    for name in ("to_q", "to_v"):
        one, two = (getattr(m.base_model.model, name) for m in (ours, theirs))
        assert_close(one.get_delta_weight("default"), two.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
        assert_close(one.base_layer.weight, two.base_layer.weight, rtol=1e-4, atol=1e-5)


def test_two_minor_halves_are_milora():
    """MiLoRA freezes the head of the spectrum and trains the tail, split by its roots."""
    model = with_lora(Attention(dtype=torch.float64), targets=("to_q", "to_v"))
    initialize(model, "ailora", part_query="minor")
    for name, layer in lora_layers(model, "default").items():
        u, s, vh = torch.linalg.svd(getattr(Attention(dtype=torch.float64), name).weight.detach(), full_matrices=False)
        assert_close(layer.base_layer.weight, nn.Parameter(u[:, :-3] * s[:-3] @ vh[:-3]))
        assert_close(layer.get_delta_weight("default"), u[:, -3:] * s[-3:] @ vh[-3:])


def test_transposed_weights():
    torch.manual_seed(0)
    base = nn.ModuleDict({"to_q": Conv1D(12, 8), "to_v": Conv1D(6, 8)})
    x, weight = inputs(8), base["to_v"].weight.detach().clone()
    before = {name: layer(x) for name, layer in base.items()}
    model = with_lora(base, targets=("to_q", "to_v"), fan_in_fan_out=True)
    initialize(model, "ailora")
    for name, layer in lora_layers(model, "default").items():
        assert_close(layer(x), before[name], rtol=0, atol=1e-5)
    tail = torch.linalg.svdvals(weight)[-3:]
    assert_close(torch.linalg.svdvals(model.base_model.model["to_v"].get_delta_weight("default"))[:3], tail)


def test_full_rank_leaves_no_residual_and_the_halves_coincide():
    products = []
    for part in ("principal", "minor"):
        model = with_lora(rank=8, alpha=8)
        initialize(model, "ailora", part_value=part)
        layer = model.base_model.model.to_v
        assert layer.base_layer.weight.abs().max() < 1e-5
        products.append(layer.get_delta_weight("default"))
    assert_close(*products, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preserve", [False, True])
def test_the_export_on_the_clean_base_and_the_merge_are_the_trained_model(preserve, tmp_path):
    model = with_lora()
    initialize(model, "ailora", preserve_base=preserve)
    train(model)
    model.eval()
    answer = model(inputs())
    exported = export_lora(model)
    assert {name: lora.rank for name, lora in exported.items()} == {"to_q": 6, "to_v": 6, "to_k": 3}
    folder = save_peft_lora(tmp_path / "lora", exported)
    again = PeftModel.from_pretrained(Attention(), str(folder))
    assert_close(again(inputs()), answer, rtol=0, atol=2e-6)
    assert (answer - Attention()(inputs())).abs().max() > 1e-2  # the training did something
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(inputs()), answer, rtol=0, atol=2e-6)
    model.merge_adapter(safe_merge=True)
    assert_close(model(inputs()), answer, rtol=0, atol=2e-6)
    model.unmerge_adapter()
    assert_close(model(inputs()), answer, rtol=0, atol=2e-6)


def test_pefts_own_conversion_agrees(tmp_path):
    model = with_lora()
    initialize(model, "ailora")
    PeftModel.save_pretrained(model, str(tmp_path / "start"))
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.save_pretrained(model, str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        again = PeftModel.from_pretrained(Attention(), str(tmp_path / "out"))
    assert_close(again(inputs()), model(inputs()), rtol=0, atol=2e-6)


def test_what_is_saved_as_usual_is_right_on_the_original_base(tmp_path):
    model = with_lora()
    initialize(model, "ailora")
    train(model)
    for number, each in enumerate((model, copy.deepcopy(model))):
        each.save_pretrained(str(tmp_path / str(number)))
        again = PeftModel.from_pretrained(Attention(), str(tmp_path / str(number)))
        assert_close(again(inputs()), model(inputs()), rtol=0, atol=2e-6)


def test_a_model_that_peft_does_not_wrap_is_warned_of():
    model = Attention()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["to_q", "to_v"]), model)
    model.peft_config = {"default": LoraConfig(r=3, target_modules=["to_q", "to_v"])}
    with pytest.warns(UserWarning, match=r"changed the base weights: what the model itself saves fits these alone"):
        initialize(model, "ailora")


def test_preserving_the_base_trains_the_same():
    models = [with_lora() for _ in range(2)]
    for model, preserve in zip(models, (False, True), strict=True):
        initialize(model, "ailora", preserve_base=preserve)
        train(model, steps=1)
    assert_close(models[0](inputs()), models[1](inputs()), rtol=1e-4, atol=1e-5)


def test_a_half_precision_base_keeps_its_function_to_one_rounding():
    base = Attention(dtype=torch.bfloat16)
    weight = base.to_q.weight.float()
    model = with_lora(base)
    initialize(model, "ailora")
    layer = model.base_model.model.to_q
    assert layer.base_layer.weight.dtype == torch.bfloat16
    back = layer.base_layer.weight.float() + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    assert (back - weight).abs().max() <= 2**-9 * weight.abs().max()


def test_a_randomized_start_is_near_the_exact_one():
    products = []
    for options in ({}, {"niter": 12, "generator": torch.Generator().manual_seed(0)}):
        model = with_lora()
        initialize(model, "ailora", **options)
        products.append([lora_layers(model, "default")[n].get_delta_weight("default") for n in ("to_q", "to_v")])
    assert_close(products[0][0], products[1][0], rtol=0, atol=1e-3)
    assert_close(products[0][1], products[1][1])  # minor parts are exact


@pytest.mark.parametrize("preserve", [False, True])
def test_a_unet_starts_at_its_own_function(tiny_sd, preserve):
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import attach_lora, unload_adapters

    sd = load_model(tiny_sd)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def ask():
        return sd.predict(noisy, torch.tensor([7]), sd.encode_prompts(["a red man"]))

    before = ask()
    modules = attach_lora(sd, rank=4)
    report = initialize(sd.denoiser, "ailora", preserve_base=preserve)
    assert sorted(report.roles) == modules
    assert {name.rpartition(".")[2]: role for name, role in report.roles.items() if not name.endswith("out.0")} == {
        "to_q": "principal",
        "to_k": "lora",
        "to_v": "minor",
    }
    assert_close(ask(), before, rtol=0, atol=2e-5)
    if preserve:
        unload_adapters(sd)
        assert torch.equal(ask(), before)


def test_transformers_models_with_grouped_queries():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    tokens = torch.arange(8)[None]
    before = llama(tokens).logits
    model = with_lora(llama, targets=("q_proj", "v_proj"))
    report = initialize(model, "ailora")
    assert set(report.roles.values()) == {"principal", "minor"}
    assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    train_free = {name for name in trainable(model) if "lora_" not in name}
    assert not train_free


def test_modules_on_the_meta_device_are_left_to_the_checkpoint():
    with torch.device("meta"):
        model = with_lora(nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)}), rank=2, targets=("to_q", "to_v"))
    assert initialize(model, "ailora").skipped == ("to_q", "to_v")
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"])
    model = get_peft_model(Attention(), config, low_cpu_mem_usage=True)  # the base is there, the adapter's tensors are yet to come
    weights = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(model, "default").items()}
    report = initialize(model, "ailora")
    assert (report.skipped, report.roles) == (("to_k", "to_q", "to_v"), {})
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in lora_layers(model, "default").items())


def test_the_first_steps_gain_on_lora_where_the_spectrum_is_strong():
    """Decaying spectra, a rank-2 shift of W_Q and W_V, Adam 3e-3, loss after five steps, three seeds. Early only: with weights half
    as large the gain is gone, and by step 20 LoRA is level."""
    for seed in range(3):
        losses = {}
        for method in ("lora", "ailora"):
            generator = torch.Generator().manual_seed(seed)
            base = Attention(24, seed)
            with torch.no_grad():
                for name in ("to_q", "to_v"):
                    layer = getattr(base, name)
                    u, _, vh = torch.linalg.svd(layer.weight, full_matrices=False)
                    layer.weight.copy_(u * (2 * 0.8 ** torch.arange(len(vh))) @ vh)
                teacher = copy.deepcopy(base)
                for name in ("to_q", "to_v"):
                    weight = getattr(teacher, name).weight
                    left, right = (torch.randn(n, 2, generator=generator) for n in weight.shape)
                    weight += 0.1 * left @ right.T / 2**0.5
            x = torch.randn(64, 8, 24, generator=generator)
            target = teacher(x).detach()
            model = with_lora(base, rank=4, alpha=4, targets=("to_q", "to_v"), seed=seed)
            if method == "ailora":
                initialize(model, "ailora")
            optimizer = torch.optim.Adam(trainable(model).values(), lr=3e-3)
            for _ in range(5):
                optimizer.zero_grad()
                loss = (model(x) - target).square().mean()
                loss.backward()
                optimizer.step()
            losses[method] = (model(x) - target).square().mean().item()
        assert losses["ailora"] < losses["lora"], (seed, losses)


class TestRefusals:
    def test_rank_above_the_layers_size(self):
        with pytest.raises(ValueError, match=r"AILoRA\.rank must be in \[1, 8\] for to_v, got 9\. The weight is \(8, 12\)"):
            initialize(with_lora(rank=9), "ailora")

    def test_no_value_or_no_query(self):
        model = with_lora(targets=("to_q", "to_k"))
        with pytest.raises(ValueError, match=r"AILoRA\.value must match a module, got .* for modules called to_k, to_q"):
            initialize(model, "ailora")
        assert initialize(model, "ailora", allow_one_sided=True).roles == {"to_k": "lora", "to_q": "principal"}
        with pytest.raises(ValueError, match=r"AILoRA\.query must match a module"):
            initialize(with_lora(targets=("to_v",)), "ailora")

    @pytest.mark.parametrize("name", ["qkv", "to_qkv", "c_attn", "in_proj_weight", "query_key_value"])
    def test_fused_projections(self, name):
        model = with_lora(nn.ModuleDict({name: nn.Linear(6, 18)}), targets=(name,))
        with pytest.raises(ValueError, match=rf"AILoRA must tell queries from values, got {name}, which holds both\. Unfuse"):
            initialize(model, "ailora", allow_one_sided=True)

    def test_weights_that_are_not_finite_or_not_float(self):
        base = Attention()
        base.to_q.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"AILoRA must have finite weights, got NaN or infinity in to_q"):
            initialize(with_lora(base), "ailora")
        model = with_lora()
        layer = model.base_model.model.to_q.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(
            TypeError, match=r"AILoRA must read float weights, got to_q in torch\.int8\. Initialize before quantizing"
        ):
            initialize(model, "ailora")

    def test_a_second_time(self):
        model = with_lora()
        initialize(model, "ailora")
        weight = model.base_model.model.to_q.base_layer.weight.clone()
        with pytest.raises(ValueError, match=r"AILoRA must start from a plain new LoRA, got to_q which is AILoRA already"):
            initialize(model, "ailora")
        assert torch.equal(model.base_model.model.to_q.base_layer.weight, weight)

    def test_a_trained_adapter(self):
        model = with_lora()
        train(model)
        with pytest.raises(ValueError, match=r"AILoRA must start from a new LoRA, got to_k which is trained"):
            initialize(model, "ailora")

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": False}])
    def test_another_methods_adapter(self, options):
        with pytest.raises(ValueError, match=r"AILoRA must start from"):
            initialize(with_lora(**options), "ailora")

    def test_convolutions_and_embeddings(self):
        for layer in (nn.Conv2d(4, 4, 3), nn.Embedding(5, 4)):
            model = with_lora(nn.ModuleDict({"to_q": layer, "to_v": nn.Linear(4, 4)}), rank=2, targets=("to_q", "to_v"))
            with pytest.raises(ValueError, match=rf"AILoRA must have linear layers only, got to_q, a {type(layer).__name__}"):
                initialize(model, "ailora")

    def test_tied_weights_unless_the_base_is_preserved(self):
        with pytest.raises(ValueError, match=r"AILoRA must have weights of its own, got to_k, which is tied"):
            initialize(with_lora(Attention(tie=True)), "ailora")
        initialize(with_lora(Attention(tie=True)), "ailora", preserve_base=True)

    def test_names(self):
        with pytest.raises(ValueError, match=r"initialize\.method must be one of .*ailora.*; got 'olora'"):
            initialize(with_lora(), "olora")
        with pytest.raises(ValueError, match=r"initialize option of ailora must be one of query, .*; got 'rank'"):
            initialize(with_lora(), "ailora", rank=3)
        with pytest.raises(ValueError, match=r"adapter must be the name of a LoRA on the model, got 'x'; the model has default"):
            initialize(with_lora(), "ailora", adapter="x")
        with pytest.raises(ValueError, match=r"the model has none"):
            initialize(Attention(), "ailora")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"query": "("}, r"AILoRA\.query must be a regular expression, got '\('"),
            ({"niter": 2}, r"AILoRA\.generator must be given with niter"),
            ({"niter": -1, "generator": torch.Generator()}, r"AILoRA\.niter must be in \[0, inf\), got -1"),
            ({"oversample": -1}, r"AILoRA\.oversample must be in \[0, inf\), got -1"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            AILoRA(**options)
