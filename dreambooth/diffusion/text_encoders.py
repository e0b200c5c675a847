"""The text encoders and tokenizers of the Stable Diffusion family: CLIP, BERT and XLM-RoBERTa.

Legend of shapes: B batch, L tokens, D text width.

Text encoders are built from a checked configuration, tokenizers from checked tables. A text encoder
returns what its diffusers pipeline passes to the U-Net. Weights that no output depends on (BERT's
pooler, the layer after the one that AltDiffusion reads) are not loaded, so that the loss depends on
every trained weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

from dreambooth.errors import ModelArtifactError, in_one_line
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import vocabulary
from dreambooth.model_folder.component_classes import BERT, XLM_ROBERTA, TextFamily
from dreambooth.model_folder.layout import read_json
from dreambooth.model_folder.sentencepiece_model import SentencePieceModel
from dreambooth.model_folder.weight_names import CLIP_PREFIX, bert_name

# What the libraries raise for a configuration that they cannot build, or cannot draw with.
BUILD_ERRORS = (
    *(TypeError, ValueError, KeyError, AttributeError, IndexError, NameError),
    *(NotImplementedError, RuntimeError, AssertionError, ZeroDivisionError, OverflowError),
    *(StrictDataclassError, ImportError),
)
# No prompt is read beyond these: the longest text encoder has 514 positions.
_MAX_VECTORS, _MAX_EXPANDED = 1024, 65_536
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class RobertaSeries(torch.nn.Module):
    """AltDiffusion's text encoder: XLM-RoBERTa and a linear map (arXiv 2308.09991).

    If its configuration sets `has_pre_transformation`, the last layer is not built: the output of
    the layer before it goes through a layer norm and the linear map.
    """

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.before_last = bool(getattr(config, "has_pre_transformation", False))
        if self.before_last:
            config.num_hidden_layers -= 1
        if not 0 <= config.pad_token_id < config.vocab_size:  # positions are counted from it
            raise ValueError(f"pad_token_id is {config.pad_token_id}")
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        if self.before_last:
            self.pre_LN = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.transformation_pre = torch.nn.Linear(config.hidden_size, config.project_dim)
        else:
            self.transformation = torch.nn.Linear(config.hidden_size, config.project_dim)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        """Encode token ids int64 [B, L]; return a tuple of one entry [B, L, D], for the U-Net."""
        hidden = self.roberta(input_ids, attention_mask=attention_mask)[0]
        if self.before_last:
            return (self.transformation_pre(self.pre_LN(hidden)),)
        return (self.transformation(hidden),)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations to save memory; the other text encoders have this method too."""
        self.roberta.gradient_checkpointing_enable()


def build(family: TextFamily, config: dict[str, Any]) -> Any:
    """Build the network of a configuration, untrained. Raises any of BUILD_ERRORS."""
    if family is BERT:
        return BertModel(BertConfig.from_dict(config), add_pooling_layer=False)
    if family is XLM_ROBERTA:
        settings = {"use_attention_mask": True, "project_dim": 512, **config}
        return RobertaSeries(XLMRobertaConfig.from_dict(settings))
    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def renamer(text_encoder: Any) -> Callable[[str], str | None]:
    """Return a function from a weight's name in a file to its name in the network.

    It returns None for a weight that no output depends on.
    """
    if isinstance(text_encoder, RobertaSeries):
        # The last layer, which is not built if `before_last` is set.
        behind = f"roberta.encoder.layer.{text_encoder.config.num_hidden_layers}."
        unread = ("roberta.pooler.", "logit_scale", "transformation.", behind)
        if not text_encoder.before_last:
            unread = ("roberta.pooler.", "logit_scale", "transformation_pre.", "pre_LN.")
        return lambda key: None if key.startswith(unread) else key
    if isinstance(text_encoder, BertModel):
        return lambda key: None if key.startswith(("pooler.", "bert.pooler.")) else bert_name(key)
    # transformers 4.x keeps a CLIP text encoder's weights under `text_model.`, 5.x does not.
    prefixed = next(iter(text_encoder.state_dict())).startswith(CLIP_PREFIX)
    prefix = CLIP_PREFIX if prefixed else ""
    return lambda key: prefix + key.removeprefix(CLIP_PREFIX)


def width(text_encoder: Any) -> int:
    """Return D, which the U-Net's cross_attention_dim must equal."""
    config = text_encoder.config
    return int(
        config.project_dim if isinstance(text_encoder, RobertaSeries) else config.hidden_size
    )


def prompt_length(tokenizer: Any, text_encoder: Any) -> int:
    """Return L, the number of tokens of a padded prompt."""
    config = text_encoder.config
    positions = int(config.max_position_embeddings)
    if isinstance(text_encoder, RobertaSeries):
        positions -= int(config.pad_token_id) + 1  # positions start after the padding's
    # A tokenizer without a configured length reports a huge number.
    return min(int(tokenizer.model_max_length), positions)


def expanded(tokenizer: Any, prompt: str) -> str:
    """Return a prompt with every token of several vectors (textual inversion) written out.

    Where the tokenizer has added tokens <thing>, <thing>_1 and <thing>_2, every <thing> becomes
    "<thing> <thing>_1 <thing>_2", as diffusers' `maybe_convert_prompt` does.
    """
    added = tokenizer.added_tokens_encoder
    for token in dict.fromkeys(tokenizer.tokenize(prompt)):  # in the order of the prompt
        vectors = [token] if token in added else []
        while vectors and len(vectors) < _MAX_VECTORS and f"{token}_{len(vectors)}" in added:
            vectors.append(f"{token}_{len(vectors)}")
        if len(vectors) > 1:
            text = " ".join(vectors)
            prompt = prompt.replace(token, text, _MAX_EXPANDED // len(text) + 1)[:_MAX_EXPANDED]
    return prompt


def with_marked_padding(
    text_encoder: Any, input_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return ids int64 [B, L] that also say which tokens a text encoder is to leave out.

    Where the text encoder takes an attention mask, an id n that `mask` leaves out becomes ~n, which
    is negative; otherwise nothing changes.
    """
    if not getattr(text_encoder.config, "use_attention_mask", False):
        return input_ids
    return torch.where(mask > 0, input_ids, ~input_ids)


def encode(text_encoder: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return encoder_hidden_states [B, L, D] of ids as `with_marked_padding` returns them."""
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = (input_ids >= 0).long()
        input_ids = torch.where(input_ids >= 0, input_ids, ~input_ids)
    features: torch.Tensor = text_encoder(input_ids, attention_mask=mask)[0]
    return features


def load_tokenizer(family: TextFamily, folder: Path, limits: Limits = LIMITS) -> Any:
    """Load a tokenizer folder after checking its tables. Raises ModelArtifactError."""
    tables = {BERT: vocabulary.read_wordpiece, XLM_ROBERTA: vocabulary.read_unigram}
    table = tables.get(family, vocabulary.read)(folder, limits=limits)
    with _library_errors_translated(family, folder):
        if isinstance(table, SentencePieceModel):
            tokenizer = _xlm_roberta_tokenizer(folder, table, limits)
        else:
            class_ = BertTokenizer if family is BERT else CLIPTokenizer
            tokenizer = class_.from_pretrained(folder, local_files_only=True)
        if tokenizer.model_max_length < 3:  # begin, one word, end; TypeError for a string
            raise ValueError(f"model_max_length is {tokenizer.model_max_length}")
        tokenizer("☃ a", padding="max_length", max_length=3, truncation=True)  # unknown, known word
    return tokenizer


def _xlm_roberta_tokenizer(folder: Path, table: SentencePieceModel, limits: Limits) -> Any:
    if (folder / vocabulary.SINGLE).is_file():
        return XLMRobertaTokenizer.from_pretrained(folder, local_files_only=True)
    # The library would need the package sentencepiece to read the same table.
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name, limits=limits)
    special = {name: _text_of(settings[name]) for name in _SPECIAL_TOKENS if name in settings}
    return XLMRobertaTokenizer(
        vocab=list(table.pieces),
        _spm_precompiled_charsmap=table.charsmap or None,
        model_max_length=settings.get("model_max_length", 512),
        **special,
    )


def _text_of(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


@contextlib.contextmanager
def _library_errors_translated(family: TextFamily, folder: Path) -> Iterator[None]:
    """Raise what the library raises for a folder as a ModelArtifactError of one sentence."""
    try:
        yield
    except BaseException as error:
        # The Rust part raises plain Exceptions, and panics with a class that it does not export.
        panic = type(error) is Exception or type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, (OSError, UnicodeError, *BUILD_ERRORS)):
            raise
        raise ModelArtifactError(
            f"{folder} does not hold a {family.name} tokenizer that can be read: "
            f"{in_one_line(error)}."
        ) from error
