"""Names the tensors of Stable Diffusion in one file, beside those in a diffusers folder.

The names are those of the code that the models were published with (CompVis/stable-diffusion,
Stability-AI/stablediffusion, open_clip), which other tools read and write. One table serves both
ways, and says the shapes too, so that a file's header alone shows whether the model is whole.

Both layouts hold the same bytes: a 1 x 1 convolution and a linear layer differ in their shape, and
open_clip's `in_proj` is the text encoder's q, k and v, one after another.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, NoReturn

from dreambooth.errors import ModelArtifactError, quoted

Family = Literal["1.x", "2.x"]
Shape = tuple[int, ...]

UNET: Final = "model.diffusion_model."
VAE: Final = "first_stage_model."
# The text encoder, under transformers' names in 1.x and open_clip's in 2.x.
TEXT: Final[Mapping[Family, str]] = {
    "1.x": "cond_stage_model.transformer.",
    "2.x": "cond_stage_model.model.",
}
EMA: Final = "model_ema."

_UP: Final = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
_MOST: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTensor:
    """One tensor of the file, and what it is in the folder.

    names: those in the component's weights; several are rows of the file's tensor, in this order.
    folder_shape: the shape of each of them there.
    """

    name: str
    shape: Shape
    part: str
    names: tuple[str, ...]
    folder_shape: Shape


class _Layer(NamedTuple):
    """A layer's names and the shape of its weight; its bias has as many numbers as it has outputs.

    is_projection: it is a 1 x 1 convolution in the file, and linear in the folder.
    """

    name: str
    folder_name: str
    shape: Shape
    has_bias: bool = True
    is_projection: bool = False


def family_of(unet: Mapping[str, Any], text_encoder: Mapping[str, Any], where: object) -> Family:
    """Return the family as which other tools would run a model of these configurations.

    They know it from the names, and take the activation of the text encoder from it: 1.x has
    CLIP's quick_gelu and convolutions around the U-Net's attention, 2.x has gelu and linear layers.
    where: what messages name. Raises ModelArtifactError for a model that is neither.
    """
    linear = unet.get("use_linear_projection", False)
    activation = text_encoder.get("hidden_act", "quick_gelu")
    found: Mapping[tuple[object, object], Family] = {
        (False, "quick_gelu"): "1.x",
        (True, "gelu"): "2.x",
    }
    if not isinstance(linear, bool) or not isinstance(activation, str):
        raise ModelArtifactError(f"{where} has a malformed configuration.")
    family = found.get((linear, activation))
    if family is None:
        raise ModelArtifactError(
            f"{where} is neither Stable Diffusion 1.x nor 2.x (use_linear_projection = {linear} "
            f"with the text encoder's {quoted(activation)}): in one file, other tools would take "
            "it for one of them and draw other pictures."
        )
    return family


def tensors(
    family: Family,
    *,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    where: object,
) -> tuple[PublishedTensor, ...]:
    """Return the tensors of a model with these configurations, in the order of its layers.

    where: what messages name. Raises ModelArtifactError for a network of other blocks.
    """
    text = _Settings(text_encoder, where, "text_encoder")
    return (
        *_tensors("unet", UNET, _unet(_Settings(unet, where, "unet"))),
        *_tensors("vae", VAE, _vae(_Settings(vae, where, "vae"))),
        *(_text_1(text) if family == "1.x" else _text_2(text)),
    )


def _tensors(part: str, prefix: str, layers: Iterable[_Layer]) -> Iterator[PublishedTensor]:
    for layer in layers:
        ones = (1, 1) if layer.is_projection else ()
        yield _tensor(part, f"{prefix}{layer.name}.weight", layer, ".weight", layer.shape, ones)
        if layer.has_bias:
            yield _tensor(part, f"{prefix}{layer.name}.bias", layer, ".bias", layer.shape[:1])


def _tensor(
    part: str, name: str, layer: _Layer, end: str, shape: Shape, ones: Shape = ()
) -> PublishedTensor:
    return PublishedTensor(
        name=name,
        shape=shape + ones,
        part=part,
        names=(layer.folder_name + end,),
        folder_shape=shape,
    )


class _Settings:
    """Reads the sizes of one configuration, which is untrusted."""

    def __init__(self, config: Mapping[str, Any], where: object, part: str) -> None:
        self._config, self._where, self._part = config, where, part

    def get(self, name: str, default: object) -> Any:
        value = self._config.get(name)
        return default if value is None else value

    def size(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if not _is_size(value):
            self.refuse(name)
        return int(value)

    def sizes(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        values = self.get(name, default)
        if not isinstance(values, (list, tuple)) or not values or not all(map(_is_size, values)):
            self.refuse(name)
        return tuple(values)

    def expect(self, name: str, values: Sequence[object]) -> None:
        """Refuse a setting that is given and none of these values."""
        value = self.get(name, values[0])
        if (list(value) if isinstance(value, tuple) else value) not in values:
            self.refuse(name)

    def refuse(self, name: str) -> NoReturn:
        raise ModelArtifactError(
            f"{self._where} cannot be one file: its {self._part}'s {name} = "
            f"{quoted(self._config.get(name))} is none of Stable Diffusion 1.x and 2.x."
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST


def _unet(settings: _Settings) -> Iterator[_Layer]:
    """Yield the U-Net's layers. Blocks are numbered through all levels; folders count in each."""
    channels = settings.sizes("block_out_channels", (320, 640, 1280, 1280))
    blocks = settings.get("down_block_types", (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"))
    if not isinstance(blocks, (list, tuple)) or any(
        not isinstance(block, str) or block not in _UP for block in blocks
    ):
        settings.refuse("down_block_types")
    if len(blocks) != len(channels):
        settings.refuse("block_out_channels")
    settings.expect("up_block_types", [[_UP[block] for block in reversed(blocks)]])
    settings.expect("mid_block_type", ["UNetMidBlock2DCrossAttn"])
    settings.expect("transformer_layers_per_block", [1])
    layers = settings.size("layers_per_block", 2)
    text_width = settings.size("cross_attention_dim", 1280)
    is_linear = settings.get("use_linear_projection", False) is True
    attends = [block.startswith("CrossAttn") for block in blocks]
    first, time, last = channels[0], 4 * channels[0], len(channels) - 1

    def block(name: str, level: str, number: int, taken: int, made: int, attending: bool) -> Any:
        yield from _unet_resnet(f"{name}.0", f"{level}.resnets.{number}", taken, made, time)
        if attending:
            folder_name = f"{level}.attentions.{number}"
            yield from _unet_attention(f"{name}.1", folder_name, made, text_width, is_linear)

    yield _Layer("time_embed.0", "time_embedding.linear_1", (time, first))
    yield _Layer("time_embed.2", "time_embedding.linear_2", (time, time))
    yield _Layer("input_blocks.0.0", "conv_in", (first, settings.size("in_channels", 4), 3, 3))
    skipped, width = [first], first
    for level, made in enumerate(channels):
        for number in range(layers):
            name, folder_name = f"input_blocks.{len(skipped)}", f"down_blocks.{level}"
            yield from block(name, folder_name, number, width, made, attends[level])
            width = made
            skipped.append(width)
        if level < last:
            name = f"input_blocks.{len(skipped)}.0.op"
            yield _Layer(name, f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3))
            skipped.append(width)
    yield from block("middle_block", "mid_block", 0, width, width, True)
    yield from _unet_resnet("middle_block.2", "mid_block.resnets.1", width, width, time)
    for level, made in enumerate(reversed(channels)):
        attending = attends[last - level]
        for number in range(layers + 1):
            name = f"output_blocks.{level * (layers + 1) + number}"
            taken = width + skipped.pop()
            yield from block(name, f"up_blocks.{level}", number, taken, made, attending)
            width = made
        if level < last:
            name = f"{name}.{2 if attending else 1}.conv"
            yield _Layer(name, f"up_blocks.{level}.upsamplers.0.conv", (width, width, 3, 3))
    yield _Layer("out.0", "conv_norm_out", (first,))
    yield _Layer("out.2", "conv_out", (settings.size("out_channels", 4), first, 3, 3))


def _unet_resnet(name: str, folder_name: str, taken: int, made: int, time: int) -> Iterator[_Layer]:
    yield _Layer(f"{name}.in_layers.0", f"{folder_name}.norm1", (taken,))
    yield _Layer(f"{name}.in_layers.2", f"{folder_name}.conv1", (made, taken, 3, 3))
    yield _Layer(f"{name}.emb_layers.1", f"{folder_name}.time_emb_proj", (made, time))
    yield _Layer(f"{name}.out_layers.0", f"{folder_name}.norm2", (made,))
    yield _Layer(f"{name}.out_layers.3", f"{folder_name}.conv2", (made, made, 3, 3))
    if taken != made:
        shape = (made, taken, 1, 1)
        yield _Layer(f"{name}.skip_connection", f"{folder_name}.conv_shortcut", shape)


def _unet_attention(
    name: str, folder_name: str, width: int, text_width: int, is_linear: bool
) -> Iterator[_Layer]:
    """Yield a transformer block; both layouts have the same names within it."""
    outside = (width, width) if is_linear else (width, width, 1, 1)
    block = "transformer_blocks.0"
    layers: list[tuple[str, Shape, bool]] = [
        ("norm", (width,), True),
        ("proj_in", outside, True),
        (f"{block}.ff.net.0.proj", (8 * width, width), True),
        (f"{block}.ff.net.2", (width, 4 * width), True),
        *((f"{block}.norm{number}", (width,), True) for number in (1, 2, 3)),
        ("proj_out", outside, True),
    ]
    for attention, read in (("attn1", width), ("attn2", text_width)):
        layers += [
            (f"{block}.{attention}.to_q", (width, width), False),
            (f"{block}.{attention}.to_k", (width, read), False),
            (f"{block}.{attention}.to_v", (width, read), False),
            (f"{block}.{attention}.to_out.0", (width, width), True),
        ]
    for inside, shape, has_bias in layers:
        yield _Layer(f"{name}.{inside}", f"{folder_name}.{inside}", shape, has_bias)


def _vae(settings: _Settings) -> Iterator[_Layer]:
    """Yield the VAE's layers. The file numbers the decoder's levels from the pixels on."""
    channels = settings.sizes("block_out_channels", (64,))
    latent, layers = settings.size("latent_channels", 4), settings.size("layers_per_block", 1)
    settings.expect("down_block_types", [["DownEncoderBlock2D"] * len(channels)])
    settings.expect("up_block_types", [["UpDecoderBlock2D"] * len(channels)])
    last, deepest = len(channels) - 1, channels[-1]
    width = channels[0]
    yield _Layer("encoder.conv_in", "encoder.conv_in", (width, 3, 3, 3))
    for level, made in enumerate(channels):
        name, folder_name = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _vae_level(name, folder_name, layers, width, made)
        width = made
        if level < last:
            sampler = f"{folder_name}.downsamplers.0.conv"
            yield _Layer(f"{name}.downsample.conv", sampler, (width, width, 3, 3))
    yield from _vae_middle("encoder", deepest)
    yield _Layer("encoder.norm_out", "encoder.conv_norm_out", (deepest,))
    yield _Layer("encoder.conv_out", "encoder.conv_out", (2 * latent, deepest, 3, 3))
    yield _Layer("decoder.conv_in", "decoder.conv_in", (deepest, latent, 3, 3))
    yield from _vae_middle("decoder", deepest)
    for level, made in enumerate(reversed(channels)):
        name, folder_name = f"decoder.up.{last - level}", f"decoder.up_blocks.{level}"
        yield from _vae_level(name, folder_name, layers + 1, width, made)
        width = made
        if level < last:
            sampler = f"{folder_name}.upsamplers.0.conv"
            yield _Layer(f"{name}.upsample.conv", sampler, (width, width, 3, 3))
    yield _Layer("decoder.norm_out", "decoder.conv_norm_out", (width,))
    yield _Layer("decoder.conv_out", "decoder.conv_out", (3, width, 3, 3))
    yield _Layer("quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    yield _Layer("post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))


def _vae_level(name: str, folder_name: str, count: int, taken: int, made: int) -> Iterator[_Layer]:
    for number in range(count):
        block, resnet = f"{name}.block.{number}", f"{folder_name}.resnets.{number}"
        yield from _vae_resnet(block, resnet, taken if number == 0 else made, made)


def _vae_resnet(name: str, folder_name: str, taken: int, made: int) -> Iterator[_Layer]:
    yield _Layer(f"{name}.norm1", f"{folder_name}.norm1", (taken,))
    yield _Layer(f"{name}.conv1", f"{folder_name}.conv1", (made, taken, 3, 3))
    yield _Layer(f"{name}.norm2", f"{folder_name}.norm2", (made,))
    yield _Layer(f"{name}.conv2", f"{folder_name}.conv2", (made, made, 3, 3))
    if taken != made:
        shape = (made, taken, 1, 1)
        yield _Layer(f"{name}.nin_shortcut", f"{folder_name}.conv_shortcut", shape)


def _vae_middle(side: str, width: int) -> Iterator[_Layer]:
    name, folder_name = f"{side}.mid", f"{side}.mid_block"
    yield from _vae_resnet(f"{name}.block_1", f"{folder_name}.resnets.0", width, width)
    inside = f"{folder_name}.attentions.0"
    yield _Layer(f"{name}.attn_1.norm", f"{inside}.group_norm", (width,))
    for each, folder_each in (
        *(("q", "to_q"), ("k", "to_k"), ("v", "to_v")),
        ("proj_out", "to_out.0"),
    ):
        yield _Layer(
            f"{name}.attn_1.{each}",
            f"{inside}.{folder_each}",
            (width, width),
            is_projection=True,
        )
    yield from _vae_resnet(f"{name}.block_2", f"{folder_name}.resnets.1", width, width)


def _text_1(settings: _Settings) -> Iterator[PublishedTensor]:
    """Yield the tensors of 1.x's text encoder, whose names in the file are transformers'."""
    for layer in _text_layers(settings):
        same = layer._replace(name=layer.folder_name)
        yield from _tensors("text_encoder", TEXT["1.x"], [same])


def _text_2(settings: _Settings) -> Iterator[PublishedTensor]:
    """Yield the tensors of 2.x's text encoder, under open_clip's names."""
    prefix = TEXT["2.x"]
    for layer in _text_layers(settings):
        if layer.name == "positional_embedding":  # a bare tensor, not a layer's weight
            name = prefix + layer.name
            yield _tensor("text_encoder", name, layer, ".weight", layer.shape)
        elif layer.folder_name.endswith(".q_proj"):  # and k_proj and v_proj, which follow
            attention = layer.folder_name.removesuffix(".q_proj")
            for end, shape in (("weight", layer.shape), ("bias", layer.shape[:1])):
                yield PublishedTensor(
                    name=f"{prefix}{layer.name}_{end}",
                    shape=(3 * shape[0], *shape[1:]),
                    part="text_encoder",
                    names=tuple(f"{attention}.{each}_proj.{end}" for each in "qkv"),
                    folder_shape=shape,
                )
        elif not layer.name.endswith(".in_proj"):
            yield from _tensors("text_encoder", prefix, [layer])


def _text_layers(settings: _Settings) -> Iterator[_Layer]:
    """Yield the text encoder's layers, with open_clip's names; its `in_proj` is three of them."""
    width, inner = settings.size("hidden_size", 512), settings.size("intermediate_size", 2048)
    entries, length = (
        settings.size("vocab_size", 49_408),
        settings.size("max_position_embeddings", 77),
    )
    embeddings = "text_model.embeddings"
    yield _Layer("token_embedding", f"{embeddings}.token_embedding", (entries, width), False)
    yield _Layer("positional_embedding", f"{embeddings}.position_embedding", (length, width), False)
    for number in range(settings.size("num_hidden_layers", 12)):
        name, folder_name = f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"
        for each in "qkv":
            projection = f"{folder_name}.self_attn.{each}_proj"
            yield _Layer(f"{name}.attn.in_proj", projection, (width, width))
        yield _Layer(f"{name}.attn.out_proj", f"{folder_name}.self_attn.out_proj", (width, width))
        yield _Layer(f"{name}.ln_1", f"{folder_name}.layer_norm1", (width,))
        yield _Layer(f"{name}.mlp.c_fc", f"{folder_name}.mlp.fc1", (inner, width))
        yield _Layer(f"{name}.mlp.c_proj", f"{folder_name}.mlp.fc2", (width, inner))
        yield _Layer(f"{name}.ln_2", f"{folder_name}.layer_norm2", (width,))
    yield _Layer("ln_final", "text_model.final_layer_norm", (width,))
