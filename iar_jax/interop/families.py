"""Which family of models a file of weights is of, by the names of its tensors, for people who took another one."""

from collections.abc import Iterable

# Names that only this family has -> what it is, and what reads it here.
FAMILIES = (
    (
        {"cls_embedding.cap_proj.fc1.weight"},
        "LlamaGen's text-to-image model, not read here",
    ),
    (
        {"tok_embeddings.weight", "cls_embedding.embedding_table.weight"},
        "a LlamaGen transformer: config.model.kind=autoregressive reads it (configs/imagenet.py:B,256)",
    ),
    (
        {"tok_emb.weight", "reg_tokens.weight"},
        "a Halton-MaskGIT transformer: config.model.kind=masked reads it (configs/imagenet.py:masked-L,384)",
    ),
    ({"model.embeddings.word_embeddings.weight"}, "TiTok's ImageBert, not read here"),
    ({"in_blocks.0.norm1.weight", "lm_head.weight"}, "TiTok's UViTBert, not read here"),
    ({"pos_start", "word_embed.weight"}, "a VAR transformer, not read here"),
    ({"encoder.conv_in.weight", "quantize.embedding.weight"}, "a VQ tokenizer: --tokenizer reads it"),
)


def family_of(names: Iterable[str]) -> str:
    """What the weights of these tensors are, and what reads them; "" where that is not known."""
    there = set(names)
    return next((family for signature, family in FAMILIES if signature <= there), "")
