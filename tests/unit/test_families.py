"""What ``all-linear`` projects in the model families of Transformers: a table, written by hand.

Every row is a tiny configuration, built without weights. At rank 8 every parameter of two or more dimensions is in one
of three columns: projected, too narrow for a subspace to save anything, or none of its business (embeddings, heads,
convolutions, and what is no linear layer). Labels are ten, so that a head is no narrow matrix by its size.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from ds_lowrank import LowRankConfig
from ds_lowrank.targets.patterns import list_targets

RANK = 8
# Names of modules change between versions; the table has those of the version that CI installs, and newer ones.
TABLE_SINCE = (5, 20)

DECODER: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
ENCODER: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 10,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 99,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 96,
    "max_position_embeddings": 32,
    "num_labels": 10,
}
XLNET: dict[str, Any] = {"vocab_size": 99, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "num_labels": 10}
GPT2: dict[str, Any] = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
BOTH: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 10,
}
T5: dict[str, Any] = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_labels": 10,
    "classifier_proj_size": 32,
}

# Names are without ``.weight``; a layer's index is *, {a,b} is both.
LLAMA = "model.layers.*.self_attn.{q,k,v,o}_proj model.layers.*.mlp.{gate,up,down}_proj"
LLAMA_EXPERTS = "model.layers.*.self_attn.{q,k,v,o}_proj model.layers.*.mlp.experts.{gate_up,down}_proj"
BERT = (
    "*.layer.*.attention.self.{query,key,value} *.layer.*.attention.output.dense *.layer.*.{intermediate,output}.dense"
)
BERT_EMBEDDINGS = "*.embeddings.{word,position,token_type}_embeddings"
DISTIL_LAYERS = "*.layer.*.attention.{q,k,v,out}_lin *.layer.*.ffn.lin{1,2}"
ALBERT = "*_layers.*.attention.{query,key,value,dense} *_layers.*.{ffn,ffn_output}"
BART = (
    "model.{encoder,decoder}.layers.*.self_attn.{q,k,v,out}_proj model.decoder.layers.*.encoder_attn.{q,k,v,out}_proj "
    "model.{encoder,decoder}.layers.*.fc{1,2}"
)
T5_LAYERS = (
    "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o} decoder.block.*.layer.*.EncDecAttention.{q,k,v,o} "
    "{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi,wo}"
)
T5_OTHERS = "shared {encoder,decoder}.block.*.layer.*.SelfAttention.relative_attention_bias"
XLNET_LAYERS = "transformer.layer.*.ff.layer_{1,2}"
XLNET_OTHERS = (
    "transformer.{mask_emb,word_embedding} transformer.layer.*.rel_attn.{q,k,v,o,r} "
    "transformer.layer.*.rel_attn.{r_r,r_s,r_w}_bias transformer.layer.*.rel_attn.seg_embed"
)
VIT = "*.attention.{q,k,v,o}_proj *.mlp.fc{1,2}"
VIT_EMBEDDINGS = "*.embeddings.{cls_token,position_embeddings} *.embeddings.patch_embeddings.projection"
CLIP = (
    "{text,vision}_model.encoder.layers.*.self_attn.{q,k,v,out}_proj {text,vision}_model.encoder.layers.*.mlp.fc{1,2}"
)
CLIP_EMBEDDINGS = "text_model.embeddings.{token,position}_embedding vision_model.embeddings.{patch,position}_embedding"
WAV2VEC2 = (
    "*.feature_projection.projection *.layers.*.attention.{q,k,v,out}_proj "
    "*.layers.*.feed_forward.{intermediate,output}_dense"
)
WAV2VEC2_OTHERS = "*.conv_layers.*.conv *.pos_conv_embed.conv.*"
FALCON = "transformer.h.*.self_attention.{query_key_value,dense} transformer.h.*.mlp.dense_{h_to_4h,4h_to_h}"


@dataclass(frozen=True)
class Family:
    """One row: a class of transformers, and the three columns."""

    model: str
    kind: str
    options: dict[str, Any]
    projected: str
    others: str
    narrow: str = ""


FAMILIES = [
    # ---- decoders
    Family("GPT2LMHeadModel", "gpt2", GPT2, "*.h.*.attn.c_{attn,proj} *.h.*.mlp.c_{fc,proj}", "transformer.w{t,p}e"),
    Family(
        "GPT2ForSequenceClassification",
        "gpt2",
        {**GPT2, "num_labels": 10},
        "*.h.*.attn.c_{attn,proj} *.h.*.mlp.c_{fc,proj}",
        "transformer.w{t,p}e score",
    ),
    Family(
        "GPTNeoForCausalLM",
        "gpt_neo",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
        },
        "*.h.*.attn.attention.{q,k,v,out}_proj *.h.*.mlp.c_{fc,proj}",
        "transformer.w{t,p}e",
    ),
    Family(
        "GPTJForCausalLM",
        "gptj",
        {**GPT2, "rotary_dim": 8},
        "*.h.*.attn.{q,k,v,out}_proj *.h.*.mlp.fc_{in,out}",
        "transformer.wte lm_head",
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        ENCODER,
        "*.layers.*.attention.{query_key_value,dense} *.layers.*.mlp.dense_{h_to_4h,4h_to_h}",
        "gpt_neox.embed_in lm_head",
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        {**ENCODER, "ffn_dim": 96, "word_embed_proj_dim": 32},
        # The embedding is narrower than the model: what lies between them is neither embedding nor head.
        "*.layers.*.self_attn.{q,k,v,out}_proj *.layers.*.fc{1,2} *.project_{in,out}",
        "*.embed_{tokens,positions}",
    ),
    Family(
        "BloomForCausalLM",
        "bloom",
        {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        FALCON,
        "transformer.word_embeddings",
    ),
    Family("FalconForCausalLM", "falcon", ENCODER, FALCON, "transformer.word_embeddings"),
    Family(
        "MptForCausalLM",
        "mpt",
        {"vocab_size": 99, "d_model": 64, "n_layers": 2, "n_heads": 4},
        "*.blocks.*.attn.{Wqkv,out_proj} *.blocks.*.ffn.{up,down}_proj",
        "transformer.wte",
    ),
    Family("LlamaForCausalLM", "llama", DECODER, LLAMA, "model.embed_tokens lm_head"),
    Family("LlamaForSequenceClassification", "llama", {**DECODER, "num_labels": 10}, LLAMA, "model.embed_tokens score"),
    Family("MistralForCausalLM", "mistral", DECODER, LLAMA, "model.embed_tokens lm_head"),
    Family("Qwen2ForCausalLM", "qwen2", DECODER, LLAMA, "model.embed_tokens lm_head"),
    Family("Qwen3ForCausalLM", "qwen3", {**DECODER, "head_dim": 16}, LLAMA, "model.embed_tokens lm_head"),
    # Its head is its embedding.
    Family("Gemma2ForCausalLM", "gemma2", {**DECODER, "head_dim": 16}, LLAMA, "model.embed_tokens"),
    # One head of keys of 8: not larger than the rank.
    Family(
        "LlamaForCausalLM",
        "llama",
        {**DECODER, "num_key_value_heads": 1, "head_dim": 8},
        "*.self_attn.{q,o}_proj *.mlp.{gate,up,down}_proj",
        "model.embed_tokens lm_head",
        "*.self_attn.{k,v}_proj",
    ),
    Family(
        "PhiForCausalLM",
        "phi",
        DECODER,
        "*.self_attn.{q,k,v}_proj *.self_attn.dense *.mlp.fc{1,2}",
        "model.embed_tokens lm_head",
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        DECODER,
        "*.self_attn.{qkv,o}_proj *.mlp.{gate_up,down}_proj",
        "model.embed_tokens lm_head",
    ),
    Family("StableLmForCausalLM", "stablelm", DECODER, LLAMA, "model.embed_tokens lm_head"),
    # ---- experts
    Family(
        "MixtralForCausalLM",
        "mixtral",
        {**DECODER, "num_local_experts": 4},
        LLAMA_EXPERTS,
        "model.embed_tokens lm_head *.mlp.gate",
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 96},
        LLAMA_EXPERTS + " *.shared_expert.{gate,up,down}_proj",
        "model.embed_tokens lm_head *.mlp.gate",
        "*.mlp.shared_expert_gate",
    ),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS, LLAMA_EXPERTS, "model.embed_tokens lm_head *.mlp.gate"),
    Family("OlmoeForCausalLM", "olmoe", EXPERTS, LLAMA_EXPERTS, "model.embed_tokens lm_head *.mlp.gate"),
    Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 96,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        "*.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj} *.mlp.{gate,up,down}_proj "
        "*.experts.{gate_up,down}_proj *.shared_experts.{gate,up,down}_proj",
        "model.embed_tokens lm_head *.mlp.gate",
    ),
    Family(
        "Llama4ForCausalLM",
        "llama4_text",
        {**DECODER, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "moe_layers": [1]},
        "*.self_attn.{q,k,v,o}_proj *.feed_forward.{gate,up,down}_proj *.experts.{gate_up,down}_proj "
        "*.shared_expert.{gate,up,down}_proj",
        "model.embed_tokens lm_head",
        "*.feed_forward.router",
    ),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        {**DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        LLAMA_EXPERTS,
        "model.embed_tokens lm_head *.mlp.router *.experts.{gate_up,down}_proj_bias",
    ),
    # ---- state spaces and other recurrences
    Family(
        "MambaForCausalLM",
        "mamba",
        {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "*.mixer.{in,x,out}_proj",
        "backbone.embeddings *.mixer.{A_log,conv1d}",
        "*.mixer.dt_proj",
    ),
    Family(
        "Mamba2ForCausalLM",
        "mamba2",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "head_dim": 16,
            "num_heads": 8,
            "n_groups": 1,
        },
        "*.mixer.{in,out}_proj",
        "backbone.embeddings lm_head *.mixer.conv1d",
    ),
    Family(
        "JambaForCausalLM",
        "jamba",
        {
            **DECODER,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
        },
        "*.mamba.{in,x,out}_proj *.self_attn.{q,k,v,o}_proj *.feed_forward.{gate,up,down}_proj "
        "*.experts.{gate_up,down}_proj",
        "model.embed_tokens lm_head *.mamba.{A_log,conv1d} *.feed_forward.router",
        "*.mamba.dt_proj",
    ),
    Family(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        {
            **EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 96,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        LLAMA_EXPERTS + " *.linear_attn.{in_proj_qkvz,out_proj} *.shared_expert.{gate,up,down}_proj",
        "model.embed_tokens lm_head *.mlp.gate *.linear_attn.conv1d",
        "*.linear_attn.in_proj_ba *.mlp.shared_expert_gate",
    ),
    Family(
        "RwkvForCausalLM",
        "rwkv",
        {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2},
        "*.attention.{key,value,receptance,output} *.feed_forward.{key,value,receptance}",
        "rwkv.embeddings head *.time_mix_{key,value,receptance}",
    ),
    # ---- encoders; poolers are layers as others are, a transform in a head's module is the head's
    Family("BertForMaskedLM", "bert", ENCODER, BERT, BERT_EMBEDDINGS + " cls.predictions.transform.dense"),
    Family(
        "BertForPreTraining",
        "bert",
        ENCODER,
        BERT + " bert.pooler.dense",
        BERT_EMBEDDINGS + " cls.predictions.transform.dense cls.seq_relationship",
    ),
    Family("BertForQuestionAnswering", "bert", ENCODER, BERT, BERT_EMBEDDINGS + " qa_outputs"),
    Family(
        "BertForSequenceClassification", "bert", ENCODER, BERT + " bert.pooler.dense", BERT_EMBEDDINGS + " classifier"
    ),
    Family("RobertaForMaskedLM", "roberta", ENCODER, BERT, BERT_EMBEDDINGS + " lm_head.dense"),
    Family(
        "RobertaForSequenceClassification",
        "roberta",
        ENCODER,
        BERT,
        BERT_EMBEDDINGS + " classifier.{dense,out_proj}",
    ),
    Family(
        "ElectraForMaskedLM",
        "electra",
        {**ENCODER, "embedding_size": 32},
        BERT + " electra.embeddings_project",
        BERT_EMBEDDINGS + " generator_predictions.dense",
    ),
    Family(
        "ElectraForPreTraining",
        "electra",
        {**ENCODER, "embedding_size": 64},
        BERT,
        BERT_EMBEDDINGS + " discriminator_predictions.dense discriminator_predictions.dense_prediction",
    ),
    Family(
        "ElectraForSequenceClassification",
        "electra",
        {**ENCODER, "embedding_size": 64},
        BERT,
        BERT_EMBEDDINGS + " classifier.{dense,out_proj}",
    ),
    Family(
        "DebertaV2ForSequenceClassification",
        "deberta-v2",
        ENCODER,
        BERT.replace("key,value}", "key,value}_proj") + " pooler.dense",
        "*.embeddings.{word,position}_embeddings classifier",
    ),
    Family(
        "DistilBertForMaskedLM",
        "distilbert",
        DISTIL,
        DISTIL_LAYERS,
        "*.embeddings.{word,position}_embeddings vocab_transform",
    ),
    Family(
        "DistilBertForSequenceClassification",
        "distilbert",
        DISTIL,
        DISTIL_LAYERS,
        "*.embeddings.{word,position}_embeddings {pre_classifier,classifier}",
    ),
    Family(
        "AlbertForPreTraining",
        "albert",
        {**ENCODER, "embedding_size": 32},
        ALBERT + " *.embedding_hidden_mapping_in albert.pooler",
        BERT_EMBEDDINGS + " predictions.dense sop_classifier.classifier",
    ),
    Family("XLNetLMHeadModel", "xlnet", XLNET, XLNET_LAYERS, XLNET_OTHERS),
    Family(
        "XLNetForSequenceClassification",
        "xlnet",
        XLNET,
        XLNET_LAYERS + " sequence_summary.summary",
        XLNET_OTHERS + " logits_proj",
    ),
    Family(
        "ModernBertForSequenceClassification",
        "modernbert",
        ENCODER,
        "model.layers.*.attn.{Wqkv,Wo} model.layers.*.mlp.{Wi,Wo}",
        "*.tok_embeddings head.dense classifier",
    ),
    # ---- encoders with decoders, and speech
    Family("T5ForConditionalGeneration", "t5", T5, T5_LAYERS, T5_OTHERS),
    Family("T5ForQuestionAnswering", "t5", T5, T5_LAYERS, T5_OTHERS + " qa_outputs"),
    Family("BartForConditionalGeneration", "bart", BOTH, BART, "model.shared *.embed_positions"),
    Family(
        "BartForSequenceClassification",
        "bart",
        BOTH,
        BART,
        "model.shared *.embed_positions classification_head.{dense,out_proj}",
    ),
    Family("MBartForConditionalGeneration", "mbart", BOTH, BART, "model.shared *.embed_positions"),
    Family("PegasusForConditionalGeneration", "pegasus", BOTH, BART, "model.shared *.embed_positions"),
    Family("MarianMTModel", "marian", BOTH, BART, "model.shared *.embed_positions"),
    Family(
        "WhisperForConditionalGeneration",
        "whisper",
        {**BOTH, "num_mel_bins": 16},
        BART,
        "model.encoder.conv{1,2} model.{encoder,decoder}.embed_positions model.decoder.embed_tokens",
    ),
    Family("Wav2Vec2ForCTC", "wav2vec2", SPEECH, WAV2VEC2, WAV2VEC2_OTHERS + " lm_head"),
    Family(
        "Wav2Vec2ForSequenceClassification",
        "wav2vec2",
        SPEECH,
        WAV2VEC2 + " projector",
        WAV2VEC2_OTHERS + " classifier",
    ),
    # ---- vision
    Family("ViTForImageClassification", "vit", {**VISION, "num_labels": 10}, VIT, VIT_EMBEDDINGS + " classifier"),
    Family(
        "DeiTForImageClassificationWithTeacher",
        "deit",
        {**VISION, "num_labels": 10},
        VIT,
        VIT_EMBEDDINGS + " *.embeddings.distillation_token {cls,distillation}_classifier",
    ),
    Family(
        "Dinov2ForImageClassification",
        "dinov2",
        {**VISION, "num_labels": 10},
        VIT,
        VIT_EMBEDDINGS + " *.embeddings.mask_token classifier",
    ),
    Family(
        "BeitForImageClassification",
        "beit",
        {**VISION, "num_labels": 10},
        VIT,
        "*.embeddings.cls_token *.embeddings.patch_embeddings.projection classifier",
    ),
    Family(
        "SwinForImageClassification",
        "swin",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
        VIT + " *.downsample.reduction",
        "*.patch_embeddings.projection *.relative_position_bias_table classifier",
    ),
    # Nothing but convolutions, and a head.
    Family(
        "ResNetForImageClassification",
        "resnet",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 10},
        "",
        "*.convolution classifier.1",
    ),
    Family(
        "ConvNextForImageClassification",
        "convnext",
        {"num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 10},
        "*.pwconv{1,2}",
        "*.patch_embeddings *.dwconv *.downsampling_layer.* classifier",
    ),
    Family(
        "SegformerForSemanticSegmentation",
        "segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "num_attention_heads": [2, 4],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
            "num_labels": 10,
        },
        VIT,
        "*.patch_embeddings.proj *.sequence_reduction *.dwconv.dwconv decode_head.*",
    ),
    # Projections into a space that text and images share are no heads: they map to no label and no token.
    Family(
        "CLIPModel",
        "clip",
        {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 32},
        CLIP + " {visual,text}_projection",
        CLIP_EMBEDDINGS,
    ),
    Family(
        "SiglipModel",
        "siglip",
        {"text_config": ENCODER, "vision_config": VISION},
        CLIP,
        CLIP_EMBEDDINGS + " text_model.head vision_model.head.*",
    ),
    Family(
        "DetrForObjectDetection",
        "detr",
        {
            **{key: value for key, value in BOTH.items() if key not in ("vocab_size", "pad_token_id")},
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
        },
        "model.{encoder,decoder}.layers.*.self_attn.{q,k,v,o}_proj model.decoder.layers.*.encoder_attn.{q,k,v,o}_proj "
        "model.{encoder,decoder}.layers.*.mlp.fc{1,2}",
        "model.backbone.* model.query_position_embeddings model.input_projection class_labels_classifier "
        "bbox_predictor.layers.*",
    ),
]


def patterns(text: str) -> list[str]:
    """``a.{b,c} d`` -> regular expressions for a.b, a.c and d; * is any text."""
    found = []
    for word in text.split():
        parts = [part.split(",") for part in re.split(r"[{}]", word)]
        found += ["".join(choice) for choice in itertools.product(*parts)]
    return [re.escape(name).replace(r"\*", ".*") for name in found]


@pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < TABLE_SINCE,
    reason="modules have other names in this version of transformers",
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model)
def test_what_is_projected(family):
    config = AutoConfig.for_model(family.kind, **family.options)
    with torch.device("meta"):
        model = getattr(transformers, family.model)(config)
    targets = list_targets(model, LowRankConfig(rank=RANK))
    matrices = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.ndim > 1}
    found = dict.fromkeys(matrices, "others")
    found.update({target.name.removesuffix(".weight"): "projected" for target in targets.projected})
    found.update({name.removesuffix(".weight"): "narrow" for name in targets.narrow})
    columns = {column: patterns(getattr(family, column)) for column in ("projected", "narrow", "others")}
    expected = {
        name: [column for column, known in columns.items() if any(re.fullmatch(p, name) for p in known)]
        for name in matrices
    }
    assert {name: [column] for name, column in found.items()} == expected
    for column, known in columns.items():  # and a row says nothing that is not there
        assert [p for p in known if not any(re.fullmatch(p, name) for name in matrices)] == [], column


def test_the_table_has_families_of_every_sort():
    assert len({family.kind for family in FAMILIES}) >= 40
