"""Write the golden models: tiny random checkpoints and what transformers computes with them in float32.

    python -m tools.make_goldens [case ...]

Needs the `golden` extra (torch, transformers). tests/golden/README.md says what each file holds. Everything follows
from the seeds, so a second run writes the same numbers (on the same versions and kind of CPU).
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

CASES_DIR = Path(__file__).resolve().parents[1] / "tests" / "golden" / "cases"
NEW_TOKENS = 24
MIN_GAP = 1e-2  # between the best two logits at every greedy step
MIN_DISTINCT = 5  # tokens in a greedy continuation: a constant one would prove little
MIN_SENSITIVITY = 1e-2  # 50 times the tolerance of the tests
MIN_GELU_SENSITIVITY = 1e-3  # the exact and the tanh GELU are themselves within 5e-4
O = 32  # the original context: prompts beyond it stay cheap
PROMPTS = (1, 9, 29, 45)  # 29 + 24 tokens cross O, 45 begins beyond it
MAX_SEEDS = 400

Config = dict[str, Any]
Mutate = Callable[[Any], None]

# Norm epsilons are far larger than the published ones, so that a wrong one shows in the logits.
SMALL: Config = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: Config = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 80,
    "vocab_size": 96,
    "layer_norm_epsilon": 2e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PHI3: Config = {**SMALL, "pad_token_id": None}  # the default, 32000, is outside our vocabulary
SHORT = [1.0, 1.05, 1.1, 1.3, 1.2, 1.6, 1.4, 2.0]
LONG = [1.1, 1.5, 2.5, 2.0, 4.0, 6.5, 8.0, 7.5]


@dataclass(frozen=True)
class Case:
    """One golden model.

    spelling: how config.json is written: "v5" as saved, "v4" with rope_theta and rope_scaling, "v1" like the first
    Llama configs, which name no rope, KV heads or head_dim at all. twins: also write config.v4.json and config.v5.json.
    sequential: transformers' decoding with its cache is not the same function as one pass (dynamic RoPE only).
    """

    family: str
    config: Config
    base: Config = field(default_factory=lambda: SMALL)
    context: int = 128
    spelling: str = "v5"
    twins: bool = False
    sequential: bool = False
    chars: bool = False


def rope(rope_type: str, theta: float = 10000.0, **settings: Any) -> Config:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **settings}}


CASES: dict[str, Case] = {
    "llama1-mha": Case("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, spelling="v1"),
    "llama2": Case("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama3-gqa": Case(
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, **rope("default", 500000.0)},
        spelling="v4",
    ),
    "llama-rope-linear": Case("llama", rope("linear", factor=4.0)),
    "llama-rope-dynamic": Case("llama", {"max_position_embeddings": O, **rope("dynamic", factor=4.0)}, sequential=True),
    "llama31-rope-llama3": Case(
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=O,
        ),
        twins=True,
    ),
    "llama32-tied": Case(
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            **rope(
                "llama3",
                500000.0,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=O,
            ),
        },
    ),
    "llama-attention-bias": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn-options": Case(
        "llama",
        rope(
            "yarn",
            100.0,
            factor=4.0,
            original_max_position_embeddings=O,
            beta_fast=2.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.3,
            truncate=False,
        ),
    ),
    "smollm2": Case(
        "llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            **rope("default", 100000.0),
        },
    ),
    "mistral-window": Case("mistral", {"sliding_window": 8}, spelling="v4"),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True, **rope("default", 1000000.0)}, spelling="v4"),
    "qwen25-yarn": Case(
        "qwen2",
        # Qwen2.5 documents this very form: the context field stays at the trained length.
        {
            "max_position_embeddings": O,
            **rope("yarn", 500.0, factor=4.0, original_max_position_embeddings=O),
        },
        twins=True,
    ),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Case(
        "qwen3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            **rope("default", 1000000.0),
        },
    ),
    "phi3": Case("phi3", {"num_key_value_heads": 2, "original_max_position_embeddings": 128}, PHI3),
    "phi3-window": Case("phi3", {"sliding_window": 8, "original_max_position_embeddings": 128}, PHI3, spelling="v4"),
    "phi3-longrope": Case(
        "phi3",
        {
            "original_max_position_embeddings": O,
            **rope("longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=O),
        },
        PHI3,
        twins=True,
    ),
    "phi3-partial-rotary": Case(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": O,
            **rope(
                "longrope",
                short_factor=SHORT[::2],
                long_factor=LONG[::2],
                partial_rotary_factor=0.5,
                original_max_position_embeddings=O,
            ),
        },
        PHI3,
        spelling="v4",
    ),
    "phi3-partial-default": Case(
        "phi3",
        {"original_max_position_embeddings": 128, **rope("default", partial_rotary_factor=0.5)},
        PHI3,
    ),
    "gpt2": Case("gpt2", {}, GPT2, context=80),
    "gpt2-char": Case(
        "gpt2",
        {"vocab_size": 65, "n_inner": None, "n_layer": 1, "bos_token_id": None, "eos_token_id": None},
        GPT2,
        context=80,
        chars=True,
    ),
    "gpt2-exact-gelu": Case("gpt2", {"activation_function": "gelu"}, GPT2, context=80),
}


# --- the model ---------------------------------------------------------------------------------------------------


def exact(x: torch.Tensor) -> torch.Tensor:
    """Round to values that bfloat16 and float16 both hold exactly."""
    x = x.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(x, x.half().float())
    return x


def randomize(model: Any, seed: int, tied: bool) -> None:
    """Perturb every parameter: norm weights are not one, biases not zero, attention far from uniform.

    Gains are chosen for logits of a few units: a fan-in scaling for matrices, doubled for q and k.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if "norm" in name or ".ln_" in name:
            value = 0.25 * noise if name.endswith("bias") else 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name or "wte" in name:
            # An untied embedding is kept small, where the first norm's epsilon shows.
            value = noise * (2.5 / model.config.hidden_size**0.5 if tied else 0.3)
        elif "wpe" in name:
            value = 0.5 * noise
        elif "lm_head" in name:
            value = noise * 3.0 / model.config.hidden_size**0.5
        else:
            conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            fan_in = p.shape[0] if conv1d else p.shape[1]
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn"))
            sharp |= "mlp.c_" in name  # the two GELUs differ by 5e-4 at most: amplify what they feed
            value = noise * (1.7 if sharp else 1.0) / fan_in**0.5
        p.copy_(exact(value))


def load(folder: Path, dtype: torch.dtype = torch.float32, config: Path | None = None, **overrides: Any) -> Any:
    """A fresh model: transformers' dynamic RoPE remembers earlier lengths, so none is used twice."""
    cfg = AutoConfig.from_pretrained(config or folder / "config.json", **overrides)
    model = AutoModelForCausalLM.from_pretrained(folder, config=cfg, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    out: np.ndarray = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy()
    return out


def greedy(model: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prompt = torch.from_numpy(ids.astype(np.int64))[None]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(ids) :].numpy().astype(np.int32)
    steps = torch.stack(out.logits, dim=1)[0].float().numpy()
    assert steps.shape[0] == tokens.shape[0] == NEW_TOKENS
    return tokens, steps


# --- spellings of the config -------------------------------------------------------------------------------------


def spell_v4(config: Config) -> Config:
    """As checkpoints of transformers 4 spell it: rope_theta and rope_scaling at the top."""
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    settings = dict(config["rope_parameters"])
    out["rope_theta"] = settings.pop("rope_theta")
    if (partial := settings.pop("partial_rotary_factor", 1.0)) != 1.0:
        out["partial_rotary_factor"] = partial
    rope_type = settings.pop("rope_type")
    if config["model_type"] == "phi3" and rope_type == "longrope":
        # Phi-3 keeps it at the top only.
        settings.pop("original_max_position_embeddings")
    key = "rope_type" if rope_type == "llama3" else "type"  # "type" is the older name, which Qwen and Phi use
    out["rope_scaling"] = None if rope_type == "default" else {key: rope_type, **settings}
    out["torch_dtype"] = "float32"
    out["transformers_version"] = "4.44.0"
    return out


def spell_v1(config: Config) -> Config:
    """As the first Llama checkpoints: nothing about rope, KV heads, head_dim or biases."""
    absent = ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "dtype")
    kept = {k: v for k, v in config.items() if k not in (*absent, "attention_dropout", "pretraining_tp")}
    return {**kept, "torch_dtype": "float32", "transformers_version": "4.28.1"}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_configs(case: Case, folder: Path) -> None:
    saved = json.loads((folder / "config.json").read_text())
    if case.family == "qwen2" and case.spelling == "v4":
        # Qwen's own files: a window that is switched off, and max_window_layers.
        saved.update(use_sliding_window=False, sliding_window=64, max_window_layers=2)
    spell = {"v5": lambda c: c, "v4": spell_v4, "v1": spell_v1}[case.spelling]
    write_json(folder / "config.json", spell(saved))
    if case.twins:
        write_json(folder / "config.v5.json", saved)
        write_json(folder / "config.v4.json", spell_v4(saved))


CHARS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def write_char_tokenizer(folder: Path) -> None:
    """tokenizer.json of a character-level model: each of tiny Shakespeare's 65 characters is one id."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    assert len(CHARS) == 65
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    text = "KING: what, ho!\n\nThou 3 & $x; y-z?"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer.save(str(folder / "tokenizer.json"))


# --- what a removed part changes -----------------------------------------------------------------------------------


def zero(match: str) -> Mutate:
    def mutate(model: Any) -> None:
        found = [p for n, p in model.named_parameters() if match in n]
        assert found, match
        for p in found:
            p.data.zero_()

    return mutate


def norms_one(match: str) -> Mutate:
    def mutate(model: Any) -> None:
        for n, p in model.named_parameters():
            if match in n and n.endswith("weight"):
                p.data.fill_(1.0)

    return mutate


def eps_less(model: Any) -> None:
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, getattr(module, name) / 10)


def no_rotation(model: Any) -> None:
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(
        f(t) for f, t in zip((torch.ones_like, torch.zeros_like), forward(x, position_ids), strict=True)
    )


def unscaled_rotation(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.rope_type = "default"
    inv_freq = 1.0 / model.config.rope_parameters["rope_theta"] ** (
        torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)
    )
    rotary.inv_freq.copy_(inv_freq)
    rotary.attention_scaling = 1.0


def no_attention_factor(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.0


def short_factors_only(model: Any) -> None:
    model.model.rotary_emb.rope_type = "default"


def same_position(model: Any) -> None:
    wpe = model.transformer.wpe.weight.data
    wpe.copy_(wpe[:1].expand_as(wpe))


def other_gelu(model: Any) -> None:
    other = "gelu" if model.config.activation_function == "gelu_new" else "gelu_new"
    for block in model.transformer.h:
        block.mlp.act = transformers.activations.ACT2FN[other]


def swapped_kv_heads(model: Any) -> None:
    """KV head h % n_kv in place of h // group, the other way one might share them."""
    cfg = model.config
    n, kv, d = cfg.num_attention_heads, cfg.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    order = [h for k in range(kv) for h in range(n) if h % kv == k]
    rows = torch.tensor([h * d + i for h in order for i in range(d)])
    for layer in model.model.layers:
        q, o = layer.self_attn.q_proj, layer.self_attn.o_proj
        q.weight.data = q.weight.data[rows]
        o.weight.data = o.weight.data[:, rows]


def removals(case: Case, model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides) of everything that must matter."""
    names = [n for n, _ in model.named_parameters()]
    cfg = model.config

    def keep(model: Any) -> None:
        pass

    yield "eps_tenth", eps_less, {}
    yield "norms_one", norms_one(".ln_" if case.family == "gpt2" else "norm"), {}
    if case.family == "gpt2":
        yield "positions", same_position, {}
        yield "other_gelu", other_gelu, {}
        for part in ("c_attn.bias", "c_fc.bias", "c_proj.bias", "ln_f.bias", "ln_1.bias"):
            yield part, zero(part), {}
        return
    yield "rotation", no_rotation, {}
    for part in ("q_proj.bias", "v_proj.bias", "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"):
        if any(part in n for n in names):
            yield part, zero(part), {}
    if any("q_norm" in n for n in names):
        yield "q_norm", norms_one("q_norm"), {}
        yield "k_norm", norms_one("k_norm"), {}
    if 1 < cfg.num_key_value_heads < cfg.num_attention_heads:
        yield "kv_sharing", swapped_kv_heads, {}
    rope_type = cfg.rope_parameters["rope_type"]
    if rope_type != "default":
        yield "rope_scaling", unscaled_rotation, {}
    if model.model.rotary_emb.attention_scaling != 1.0:
        yield "attention_factor", no_attention_factor, {}
    if rope_type == "longrope":
        yield "long_factor", short_factors_only, {}
    if getattr(cfg, "sliding_window", None) is not None:
        width = cfg.sliding_window
        yield "window", keep, {"sliding_window": 1000}
        yield "window_plus_one", keep, {"sliding_window": width + 1}
        yield "window_minus_one", keep, {"sliding_window": width - 1}
    if "sliding_attention" in (getattr(cfg, "layer_types", None) or []):
        yield "max_window_layers", keep, {"layer_types": ["sliding_attention"] * cfg.num_hidden_layers}


# --- one case ------------------------------------------------------------------------------------------------------


class UnfairError(Exception):
    """This seed does not give a fair golden."""


def kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) per row, in nats, computed in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        out: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return out

    p, q = log_softmax(reference), log_softmax(other)
    out: np.ndarray = (np.exp(p) * (p - q)).sum(-1)
    return out


def run_prompts(folder: Path, vocab: int, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of golden.npz and the smallest gap; UnfairError as soon as a gap or a continuation is unfair."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    min_gap = float("inf")
    for j, n in enumerate(PROMPTS):
        ids = rng.integers(3, vocab, n).astype(np.int32)
        tokens, steps = greedy(load(folder), ids)
        best = np.sort(steps, axis=-1)
        min_gap = min(min_gap, float((best[:, -1] - best[:, -2]).min()))
        if min_gap <= MIN_GAP:
            raise UnfairError(f"gap {min_gap:.4f}")
        if len(set(tokens.tolist())) < MIN_DISTINCT:
            raise UnfairError("constant continuation")
        arrays |= {f"prompt_{j}": ids, f"greedy_{j}": tokens, f"steps_{j}": steps}
        arrays[f"logits_{j}"] = logits_of(load(folder), ids)
    return arrays, min_gap


def cache_difference(folder: Path, arrays: dict[str, np.ndarray]) -> float:
    """Max |logit difference| between decoding with the cache and one pass over the sequence so far."""
    model = load(folder)
    worst = 0.0
    for j in range(len(PROMPTS)):
        for t in range(NEW_TOKENS):
            logits_of(model, arrays["prompt_0"])  # one token: dynamic RoPE forgets the longer passes
            ids = np.concatenate([arrays[f"prompt_{j}"], arrays[f"greedy_{j}"][:t]])
            worst = max(worst, float(np.abs(logits_of(model, ids)[-1] - arrays[f"steps_{j}"][t]).max()))
    return worst


def make(name: str, case: Case) -> str:
    folder = CASES_DIR / name
    config = AutoConfig.for_model(case.family, **{**case.base, **json.loads(json.dumps(case.config))})
    for seed in range(1, MAX_SEEDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed, config.tie_word_embeddings)
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        write_configs(case, folder)
        try:
            arrays, min_gap = run_prompts(folder, config.vocab_size, seed)
        except UnfairError:
            continue
        break
    else:
        raise SystemExit(f"{name}: no seed below {MAX_SEEDS} gives a fair golden")

    if case.chars:
        write_char_tokenizer(folder)
    difference = cache_difference(folder, arrays)
    assert case.sequential == (difference > 1e-3), f"{name}: cache and single pass differ by {difference}"
    rows = [arrays[f"logits_{j}"] for j in range(len(PROMPTS))]
    prompts = [arrays[f"prompt_{j}"] for j in range(len(PROMPTS))]
    for twin in sorted(folder.glob("config.v?.json")):
        for ids, row in zip(prompts, rows, strict=True):
            np.testing.assert_array_equal(logits_of(load(folder, config=twin), ids), row, err_msg=str(twin))

    divergence: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float16):
        low = [logits_of(load(folder, dtype), ids) for ids in prompts]
        divergence[str(dtype).removeprefix("torch.")] = float(
            np.concatenate([kl(a, b) for a, b in zip(rows, low, strict=True)]).mean()
        )
    sensitivity: dict[str, float] = {}
    for part, mutate, overrides in removals(case, load(folder)):
        changed = load(folder, **overrides)
        mutate(changed)
        sensitivity[part] = float(np.abs(logits_of(changed, prompts[-1]) - rows[-1]).max())
    floor = {"other_gelu": MIN_GELU_SENSITIVITY}
    dull = {k: v for k, v in sensitivity.items() if v < floor.get(k, MIN_SENSITIVITY)}
    assert not dull, f"{name}: the logits do not show {dull}"

    columns: dict[str, Any] = {**arrays}
    np.savez_compressed(folder / "golden.npz", **columns)
    logits = np.concatenate(rows)
    meta = {
        "case": name,
        "family": case.family,
        "spelling": case.spelling,
        "seed": seed,
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
        },
        "context": case.context,
        "prompt_lengths": list(PROMPTS),
        "min_gap": round(min_gap, 5),
        "logit_std": round(float(logits.std()), 3),
        "kl": divergence,
        "cached_equals_one_pass": not case.sequential,
        "cache_difference": difference,
        "sensitivity": {k: round(v, 4) for k, v in sensitivity.items()},
    }
    write_json(folder / "meta.json", meta)
    size = sum(f.stat().st_size for f in folder.iterdir())
    low_kl = " ".join(f"{k} {v:.1e}" for k, v in divergence.items())
    weakest = min(sensitivity.items(), key=lambda kv: kv[1])
    return (
        f"{name:22} seed {seed:3} gap {min_gap:.3f} std {logits.std():.2f} kl {low_kl} "
        f"cache {difference:.1e} weakest {weakest[0]} {weakest[1]:.3f} {size / 1000:.0f} kB"
    )


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"unknown case {sorted(unknown)}; the cases are {' '.join(CASES)}")
    for name in names or CASES:
        print(make(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
