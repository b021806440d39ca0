"""Names of latent diffusion's first code (arXiv 2112.10752) for UNets, VAEs and CLIPs: those of single files.

ComfyUI and AUTOMATIC1111's web UI read these. The names are facts of the published checkpoints of Stable Diffusion 1.5,
2.1, XL and 3; diffusers' `single_file_utils.py` reads them too, and tests compare both ways.
"""

import re
from collections.abc import Iterable

from dreambooth.models.placed import Names, Placed

DENOISER, VAE, VAE_OF_FLOWS = "model.diffusion_model.", "first_stage_model.", "vae."
CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIP_XL = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.1.model.",
)
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},  # diffusers' before 0.15, still in files
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def unet_names(names: Iterable[str], prefix: str = DENOISER) -> Names:
    """A UNet2DConditionModel: its blocks counted through, downsamplers and upsamplers included."""
    names = list(names)
    resnets = {name.split(".")[3] for name in names if name.startswith("up_blocks.0.resnets.")}
    per_block = len(resnets)  # of the way up; the way down has one resnet less and a downsampler
    with_attention = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}

    def original(name: str) -> str:
        module, _, ending = name.rpartition(".")
        if module in _UNET:
            return f"{_UNET[module]}.{ending}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, place, rest = found[1], int(found[2]), found[3]
            return f"middle_block.{2 * place + (kind == 'attentions')}.{_in_block(kind, rest)}"
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if found is None:
            raise ValueError(f"{name} has no place in the layout of a single file")
        way, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{(block + 1) * per_block - 1}.{1 + (str(block) in with_attention)}.{rest}"
        number = block * per_block + place + (way == "down")
        side = "input" if way == "down" else "output"
        return f"{side}_blocks.{number}.{int(kind == 'attentions')}.{_in_block(kind, rest)}"

    return {name: Placed(name=prefix + original(name)) for name in names}


def _in_block(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    module, _, ending = rest.partition(".")
    return f"{_RESNET[module]}.{ending}"


def vae_names(names: Iterable[str], prefix: str = VAE) -> Names:
    """An AutoencoderKL: its decoder's blocks are counted from the picture, and its attention is of convolutions."""
    names = list(names)
    ups = {int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks.")}
    last = max(ups, default=0)

    def placed(name: str) -> Placed:
        if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            module = _VAE_ATTENTION[found[2]]
            form = "pointwise" if module != "norm" and found[3] == "weight" else "same"
            return Placed(name=f"{prefix}{found[1]}.mid.attn_1.{module}.{found[3]}", form=form)  # type: ignore[arg-type]
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
        return Placed(name=prefix + re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name))

    return {name: placed(name) for name in names}


def clip_names(names: Iterable[str], prefix: str) -> Names:
    """A CLIP text encoder by the names of its repository, which transformers 5 writes without `text_model.`."""
    return {name: Placed(name=prefix + _with_text_model(name)) for name in _weights(names)}


def open_clip_names(names: Iterable[str], prefix: str) -> Names:
    """A CLIP text encoder by OpenCLIP's names: query, key and value in one, the projection transposed."""

    def placed(name: str) -> Placed:
        name = _with_text_model(name).removeprefix("text_model.")
        if name == "text_projection.weight":
            return Placed(name=f"{prefix}text_projection", form="transposed")
        if name in _OPEN_CLIP:
            return Placed(name=prefix + _OPEN_CLIP[name])
        _, _, layer, rest = name.split(".", 3)  # encoder.layers.N.…
        module, _, ending = rest.rpartition(".")
        block = f"{prefix}transformer.resblocks.{layer}."
        if (part := module.rpartition(".")[2]) in _QUERY_KEY_VALUE:
            return Placed(name=f"{block}attn.in_proj_{ending}", place=_QUERY_KEY_VALUE.index(part))
        return Placed(name=f"{block}{_OPEN_CLIP_LAYER[module]}.{ending}")

    return {name: placed(name) for name in _weights(names)}


def t5_names(names: Iterable[str], prefix: str = T5) -> Names:
    """T5's encoder by the names of its repository; the embedding twice, as some readers want either name of it."""
    second = "encoder.embed_tokens.weight"
    return {
        name: Placed(name=prefix + name, copies=(prefix + second,) if name == "shared.weight" else ())
        for name in names
        if name != second
    }


def renamed(name: str, rules: Iterable[tuple[str, str]], prefix: str) -> str:
    """A name by the first of some regular expressions that fits it whole. Raises ValueError where none does."""
    for pattern, replacement in rules:
        if (found := re.fullmatch(pattern, name)) is not None:
            return prefix + found.expand(replacement)
    raise ValueError(f"{name} has no place in the layout of a single file")


def _with_text_model(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _weights(names: Iterable[str]) -> list[str]:
    """All but the positions' numbers, which every version of the library counts anew."""
    return [name for name in names if not name.endswith("position_ids")]
