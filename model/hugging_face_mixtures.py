"""Mixtures of experts in Hugging Face's config.json, to and from our config. Imports no torch.

Their balancing loss is num_picked times Switch's, of the counts and scores of all layers as if they were one; ours is
Switch's, added up over the layers. So balance_weight = router_aux_loss_coef * num_picked / layers with experts: the
same pull on every layer while layers are equally loaded. DeepSeek's aux_loss_alpha weighs the loss of layers, as ours.
"""

from typing import Any

from model.config import ModelConfig
from model.hugging_face_keys import ConvertError, Table, flag, number, whole_numbers
from model.moe_config import MoEConfig


def read_mixtral(table: Table) -> MoEConfig:
    """Experts in every layer, renormalised."""
    layers = list(range(number(table, "num_hidden_layers", int)))
    return _softmax_mixture(table, layers, expert_size=number(table, "intermediate_size", int), renormalise=True)


def read_olmoe(table: Table) -> MoEConfig:
    """Experts in every layer, renormalised or not."""
    layers = list(range(number(table, "num_hidden_layers", int)))
    renormalise = flag(table, "norm_topk_prob", default=False)
    return _softmax_mixture(table, layers, number(table, "intermediate_size", int), renormalise)


def read_qwen(table: Table) -> MoEConfig:
    """Experts in chosen layers; in Qwen2-MoE beside a network with a gate, which all tokens pass."""
    dense = whole_numbers(table, "mlp_only_layers")
    every = number(table, "decoder_sparse_step", int, 1)
    if every < 1:
        raise ConvertError(f"config.json: decoder_sparse_step = {every}: must be positive")
    num_layers = number(table, "num_hidden_layers", int)
    layers = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % every == 0]
    shared: dict[str, Any] = {}
    if table["model_type"] == "qwen2_moe":
        shared = {"shared_size": number(table, "shared_expert_intermediate_size", int), "shared_gate": True}
    renormalise = flag(table, "norm_topk_prob", default=False)
    return _softmax_mixture(table, layers, number(table, "moe_intermediate_size", int), renormalise, **shared)


def read_deepseek(table: Table) -> MoEConfig:
    """Sigmoid scores, a bias that only picks, groups, and shared experts, which are one network; above dense layers."""
    num_layers = number(table, "num_hidden_layers", int)
    layers = list(range(max(0, number(table, "first_k_dense_replace", int)), num_layers))
    if not layers:
        return MoEConfig()
    expert_size = number(table, "moe_intermediate_size", int)
    alpha = number(table, "aux_loss_alpha", float, 0.0)
    balance = "sequence" if flag(table, "seq_aux", default=True) else "global"
    return MoEConfig(
        num_experts=number(table, "n_routed_experts", int),
        num_picked=number(table, "num_experts_per_tok", int),
        expert_size=expert_size,
        shared_size=number(table, "n_shared_experts", int) * expert_size,
        scores="sigmoid",
        renormalise=flag(table, "norm_topk_prob", default=True),
        route_scale=number(table, "routed_scaling_factor", float),
        num_groups=number(table, "n_group", int, 1),
        num_picked_groups=number(table, "topk_group", int, 1),
        bias="sign",
        **({"balance": balance, "balance_weight": alpha} if alpha else {}),
        **placement(layers, num_layers),
    )


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Mixtral's keys."""
    return {
        "intermediate_size": config.moe.expert_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_picked,
        "router_jitter_noise": 0.0,
        **_loss_keys(config),
    }


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    """OLMoE's keys."""
    return {
        "intermediate_size": config.moe.expert_size,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_picked,
        "norm_topk_prob": config.moe.renormalise,
        "clip_qkv": None,
        **_loss_keys(config),
    }


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    """Qwen2-MoE's and Qwen3-MoE's keys; a list of dense layers says what their step cannot."""
    moe = config.moe
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_picked,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.num_layers) if not config.has_experts(layer)],
        **_loss_keys(config),
    }


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek-V3's keys; a dense model is one whose layers are all before the first with experts."""
    first_dense = config.expert_layers[0] if config.expert_layers else config.num_layers
    moe = config.moe if config.expert_layers else MoEConfig(num_experts=2, num_picked=1, shared_size=1_024)
    num_shared, rest = divmod(moe.shared_size, moe.expert_size)
    if rest or not num_shared:
        raise ConvertError(
            f"model.moe.shared_size = {moe.shared_size}: DeepSeek-V3 has whole shared experts, at least one; a "
            f"multiple of model.moe.expert_size = {moe.expert_size} can be exported"
        )
    if moe.num_experts // moe.num_groups < 2:
        raise ConvertError(
            f"model.moe.num_experts = {moe.num_experts} in model.moe.num_groups = {moe.num_groups}: DeepSeek-V3 judges "
            "a group by its two best experts; only groups of two or more can be exported"
        )
    return {
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_picked,
        "moe_intermediate_size": moe.expert_size,
        "n_shared_experts": num_shared,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.route_scale,
        "n_group": moe.num_groups,
        "topk_group": moe.num_picked_groups,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "seq_aux": moe.balance in ("none", "sequence"),
        "aux_loss_alpha": 0.0 if moe.balance == "none" else moe.balance_weight,
    }


def placement(layers: list[int], num_layers: int) -> dict[str, Any]:
    """Our two keys for the layers with experts, the smallest that say it."""
    for every in range(1, num_layers + 1):
        keys: dict[str, Any] = {"first_dense_layers": layers[0], "layer_every": every}
        moe = MoEConfig(num_experts=1, num_picked=1, **keys)
        if ModelConfig(num_layers=num_layers, moe=moe).expert_layers == tuple(layers):
            return keys
    raise ConvertError(
        f"config.json: mlp_only_layers and decoder_sparse_step put experts into layers {layers}; only every so "
        "many-th layer from one on is implemented"
    )


def _softmax_mixture(table: Table, layers: list[int], expert_size: int, renormalise: bool, **shared: Any) -> MoEConfig:
    if not layers:
        return MoEConfig()
    num_picked = number(table, "num_experts_per_tok", int)
    coefficient = number(table, "router_aux_loss_coef", float, 0.0)
    # Which of the two names a table has depends on the version that wrote it.
    num_experts = number(table, "num_experts" if "num_experts" in table else "num_local_experts", int)
    weight = coefficient * num_picked / len(layers)
    return MoEConfig(
        num_experts=num_experts,
        num_picked=num_picked,
        expert_size=expert_size,
        renormalise=renormalise,
        **({"balance": "global", "balance_weight": weight} if coefficient else {}),
        **placement(layers, number(table, "num_hidden_layers", int)),
        **shared,
    )


def _loss_keys(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    is_balanced = moe.balance != "none"
    coefficient = moe.balance_weight * len(config.expert_layers) / moe.num_picked if is_balanced else 0.0
    return {"router_aux_loss_coef": coefficient, "output_router_logits": False}
