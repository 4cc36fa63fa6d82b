"""Llama (2, 3, 3.1, 3.2, 3.3), and what the families that grew from it share.

A family that is Llama but for a bias, a norm or a window says so in a subclass of a few lines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch.nn.functional import silu

from mcore_sft.config import ConfigError
from mcore_sft.model.architecture import Architecture, RopeScaling
from mcore_sft.model.weight_table import Segment, Table, Weight, plain


@dataclass(frozen=True, kw_only=True)
class Llama(Architecture):
    """Grouped queries, RMSNorm before attention and MLP, SwiGLU, rotary embeddings."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Keys that every published config.json of the family has, and whose default is not Llama's."""
    whole_context: ClassVar[Mapping[str, Any]] = {}
    """Keys of a config.json without a sliding window, where the family's default has one."""
    supported: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
    }
    """The one value of a key that can be built."""

    @classmethod
    def read(cls, path: Path, config: dict[str, Any]) -> Self:
        """What the `config` in the file `path` says.

        Raises `ConfigError` for what cannot be built, KeyError and others for what is wrong.
        """
        stated = _rope_section(config) | config
        for key, value in cls.supported.items():
            if stated.get(key, value) not in (value, None):
                raise ConfigError(f"{path}: {key} is {stated[key]!r}; only {value!r} is supported")
        for key in cls.needs:
            if key not in config:
                raise KeyError(key)
        heads = config["num_attention_heads"]
        theta, factor, scaling = _rope(path, config)
        window = config.get("sliding_window") if cls.uses_window(config) else None
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_factor=factor,
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config["max_position_embeddings"],
            window=window if window and window < config["max_position_embeddings"] else None,
        )

    @classmethod
    def uses_window(cls, config: dict[str, Any]) -> bool:
        """Whether attention has the window of `config`; Qwen says so by a key of its own."""
        return bool(config.get("use_sliding_window", False))

    def layer_settings(self) -> dict[str, Any]:
        """Megatron-core's words for what the layers are made of."""
        return {
            "gated_linear_unit": True,
            "activation_func": silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            # With it, the gradients of these norms are summed over the heads of all tensor ranks.
            "qk_layernorm": self.qk_norm,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_eps,
        }

    def set_norms(self, layer: Any, norm: type) -> None:
        """Put `norm` before attention and MLP, and on queries and keys where they have one."""
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if self.qk_norm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm

    def layer_weights(self, theirs: str) -> Table:
        """The weights of the layer that Hugging Face calls `theirs`."""
        attention, mlp, hidden = f"{theirs}.self_attn", f"{theirs}.mlp", self.hidden
        gate_up = (
            Segment(f"{mlp}.{name}.weight", 0, self.intermediate, (hidden,))
            for name in ("gate_proj", "up_proj")
        )
        table = {
            "self_attention.linear_qkv.layer_norm_weight": plain(
                f"{theirs}.input_layernorm.weight", hidden
            ),
            "self_attention.linear_qkv.weight": self._by_group(attention, "weight", hidden),
            "self_attention.linear_proj.weight": plain(
                f"{attention}.o_proj.weight", hidden, self.heads * self.head_dim, split="columns"
            ),
            "mlp.linear_fc1.layer_norm_weight": plain(
                f"{theirs}.post_attention_layernorm.weight", hidden
            ),
            "mlp.linear_fc1.weight": Weight(tuple(gate_up), "rows"),
            "mlp.linear_fc2.weight": plain(
                f"{mlp}.down_proj.weight", hidden, self.intermediate, split="columns"
            ),
        }
        if self.qkv_bias:
            table["self_attention.linear_qkv.bias"] = self._by_group(attention, "bias")
        if self.qk_norm:
            for norm in ("q", "k"):
                table[f"self_attention.{norm}_layernorm.weight"] = plain(
                    f"{attention}.{norm}_norm.weight", self.head_dim
                )
        return table

    def _by_group(self, attention: str, kind: str, *row: int) -> Weight:
        """For each key-value head: the query heads that share it, then its key, then its value."""
        heads = {
            "q_proj": self.heads // self.kv_heads * self.head_dim,
            "k_proj": self.head_dim,
            "v_proj": self.head_dim,
        }
        segments = (
            Segment(f"{attention}.{name}.{kind}", group * size, (group + 1) * size, row)
            for group in range(self.kv_heads)
            for name, size in heads.items()
        )
        return Weight(tuple(segments), "rows")


def _rope_section(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls `rope_scaling`, and 5 `rope_parameters`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope(path: Path, config: dict[str, Any]) -> tuple[float, float, RopeScaling | None]:
    """Base, linear factor and Llama 3's scaling."""
    rope = _rope_section(config)
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, float(rope["factor"]), None
    if kind != "llama3":
        raise ConfigError(
            f"{path}: rope scaling {kind!r} is not supported; expected 'default', 'linear' or "
            "'llama3'"
        )
    original = "original_max_position_embeddings"
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(config[original] if original in config else rope[original]),
    )
    return theta, 1.0, scaling
