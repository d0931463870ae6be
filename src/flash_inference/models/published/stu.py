"""Flash STU: spectral transform units alternating with attention, as flash-stu saves them for transformers.

`phi` is read from the checkpoint: eigenvectors have no sign of their own, and depend on the length they were made for.
Source: github.com/hazan-lab/flash-stu-2, github.com/windsornguyen/flash-stu.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from flash_inference.models.published.layout import AS_IS, Layout, Rename, View
from flash_inference.models.published.settings import TRANSFORMERS, Settings
from flash_inference.models.stu import STUConfig
from flash_inference.models.tokens import TOKENIZER

EPS = 1e-6
TRAINING = (
    "bsz", "global_bsz", "num_epochs", "warmup_steps", "eval_period", "save_period", "max_lr", "min_lr", "max_norm",
    "fsdp", "ddp", "mixed_precision", "use_cpu_offload", "sharding_strategy", "state_dict_type", "auto_wrap_policy",
    "backward_prefetch", "forward_prefetch", "sync_module_states", "use_orig_params", "device_id", "precision",
    "fsdp_modules", "use_activation_checkpointing", "use_flash_fft", "torch_compile", "dropout", "hidden_act",
)  # fmt: skip
ATTENTION = {"qkv": "c_attn", "out": "c_proj"}
TRANSPOSED = View(lambda t: t.T, lambda t: t.T)


def _renames(config: STUConfig, names: Collection[str]) -> list[Rename]:
    first, embedding = "blocks.0.mixer.", Rename("embedding.weight", ("tok_emb.weight",), ("lm_head.weight",))
    inside = "unit." if config.expanded else ""
    phi = Rename(f"{first}{inside}filter.phi", ("phi",), float32=True)
    table = [embedding, Rename("norm.weight", ("norm.weight",)), phi]
    for i in range(config.layers):
        table += _of_layer(config, config.kind(i), f"blocks.{i}.", f"layers.{i}.")
    return table


def _of_layer(config: STUConfig, kind: str, ours: str, layer: str) -> list[Rename]:
    """The tensors of one layer: a unit or attention, and the MLP behind it."""
    norm = "attn_norm" if kind == "attention" else "stu_norm"
    pairs = {"norm1.weight": f"{norm}.weight", "norm2.weight": "mlp_norm.weight"}
    pairs |= {f"mlp.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    if kind == "attention":
        pairs |= {f"mixer.mixer.{part}.weight": f"attn.{name}.weight" for part, name in ATTENTION.items()}
    unit = "mixer."
    if kind == "stu" and config.expanded:
        unit = "mixer.unit."
        pairs |= {"mixer.up.weight": "stu_mlp_in_proj.weight", "mixer.down.weight": "stu_mlp_out_proj.weight"}
    if kind == "stu" and config.form == "exact":
        pairs[f"{unit}plus"] = "stu.M_phi_plus"
        pairs |= {f"{unit}minus": "stu.M_phi_minus"} if config.hankel == "Z" else {}
    elif kind == "stu":
        pairs |= {f"{unit}inputs.weight": "stu.M_inputs", f"{unit}filter.mixture": "stu.M_filters"}
    return [
        Rename(ours + name, (layer + published,), view=TRANSPOSED if published == "stu.M_inputs" else AS_IS)
        for name, published in pairs.items()
    ]


def _stu(settings: Settings, tensors: Mapping[str, Tensor]) -> STUConfig:
    settings.ignore(*TRAINING, *TRANSFORMERS)
    # The published model ties its head whatever this says.
    settings.ignore("tie_word_embeddings")
    settings.only("linear maps have no bias here", bias=False)
    settings.only("units look at every position", dilation=1)
    width, length = settings.integer("n_embd"), settings.integer("seq_len")
    inner = width * settings.integer("mlp_scale", 12)
    settings.only("they are n_embd and n_embd * mlp_scale", hidden_size=width, intermediate_size=inner)
    sandwich = settings.flag("stu_enable_mlp_sandwich", False)
    expanded = settings.integer("stu_mlp_hidden_size", inner) if sandwich else 0
    settings.ignore("stu_mlp_hidden_size")
    eps = f"the norms' epsilon is stored nowhere; {EPS} was used, as in Liger's norm (rms_norm_eps sets it)"
    settings.notes.append("phi is the checkpoint's; the signs of eigenvectors are arbitrary, so none was computed")
    return STUConfig(
        vocab_size=settings.integer("vocab_size"),
        width=width,
        layers=settings.integer("n_layers"),
        length=length,
        pattern=("stu", "attention") if settings.flag("use_attn", True) else ("stu",),
        count=settings.within("num_eigh", range(1, length + 1), 24, "that seq_len leaves"),
        hankel="L" if settings.flag("use_hankel_L", False) else "Z",
        form="tensordot" if settings.flag("use_approx", True) else "exact",
        expanded=expanded,
        inner=inner,
        activation=_activation(settings),
        heads=settings.integer("n_heads", 8),
        # The published kernel counts the positions before a query's own.
        window=settings.integer("window_size", 1024) + 1,
        softcap=settings.number("softcap", 50.0, "softcap is not given; the published default 50.0 was used"),
        norm_eps=settings.number("rms_norm_eps", EPS, eps),
        tokens=TOKENIZER,
    )


def _activation(settings: Settings) -> str:
    """The MLP's activation, which the config cannot tell: `hidden_act` is for Liger's MLP, in the older code alone."""
    told = "mlp_activation is stored nowhere; gelu was used, as in flash-stu-2 (silu where Liger's MLP was trained)"
    settings.notes += [told] if "mlp_activation" not in settings else []
    return settings.word("mlp_activation", {"gelu": "gelu-tanh", "silu": "silu"}, "gelu")


def _is_stu(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "num_eigh" in config and any(".stu." in name for name in names)


LAYOUTS = (Layout("flash-stu", "Flash STU for transformers", _is_stu, _stu, _renames),)
