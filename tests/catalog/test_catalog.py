"""The catalog against HIP-39's own tables, and against files that are wrong."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

from zenray.catalog import Catalog
from zenray.catalog.entries import ChatGroup
from zenray.spec.errors import InvalidDocument, ModelNotFound

B = 10**9


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


@pytest.mark.parametrize(
    ("name", "total", "active", "experts", "context_tokens", "modalities"),
    [
        ("zen-600m", 600_000_000, 600_000_000, 1, 8192, "text"),
        ("zen-1b", 1 * B, 1 * B, 1, 8192, "text"),
        ("zen-3b", 3 * B, 3 * B, 1, 32768, "text"),
        ("zen-7b", 7 * B, 7 * B, 1, 32768, "text vision code"),
        ("zen-14b", 14 * B, 3_500_000_000, 16, 32768, "text vision audio code"),
        ("zen-32b", 32 * B, 8 * B, 32, 131072, "text vision audio code"),
        ("zen-72b", 72 * B, 18 * B, 64, 131072, "text vision audio code"),
        ("zen-235b", 235 * B, 37 * B, 96, 131072, "text vision audio code"),
        ("zen-480b", 480 * B, 60 * B, 128, 1048576, "text vision audio code"),
    ],
)
def test_sizes_of_hip_39(
    catalog: Catalog, name: str, total: int, active: int, experts: int, context_tokens: int, modalities: str
) -> None:
    entry = catalog.get(name)
    assert (entry.parameters.total, entry.parameters.active, entry.experts) == (total, active, experts)
    assert (entry.context_tokens, entry.modalities) == (context_tokens, tuple(modalities.split()))
    assert entry.family == "zen"
    assert entry.sources[0].hub == f"zenlm/{name}"
    assert ("full" in entry.fine_tuning) == (total <= 7 * B)


def test_chat_selector_has_the_fourteen_variants(catalog: Catalog) -> None:
    menu = {group: {entry.name for entry in entries} for group, entries in catalog.chat_menu().items()}
    assert menu == {
        ChatGroup.SMALL: {"zen-3b", "zen-7b"},
        ChatGroup.MEDIUM: {"zen-14b", "zen-32b"},
        ChatGroup.LARGE: {"zen-72b", "zen-235b"},
        ChatGroup.FRONTIER: {"zen-480b"},
        ChatGroup.SPECIALIZED: {
            "zen-7b-code",
            "zen-14b-code",
            "zen-32b-math",
            "zen-72b-long",
            "zen-7b-vision",
            "zen-32b-vision",
            "zen-72b-vision",
        },
    }
    assert list(menu) == list(ChatGroup)


@pytest.mark.parametrize(
    ("name", "price_in", "price_out", "requests_per_minute"),
    [
        ("zen-7b", "0.0003", "0.0006", 1000),
        ("zen-32b", "0.0015", "0.003", 500),
        ("zen-72b", "0.004", "0.008", 200),
        ("zen-480b", "0.015", "0.03", 50),
    ],
)
def test_given_prices_and_limits(
    catalog: Catalog, name: str, price_in: str, price_out: str, requests_per_minute: int
) -> None:
    entry = catalog.get(name)
    assert entry.price.input_usd_per_1k == Decimal(price_in)
    assert entry.price.output_usd_per_1k == Decimal(price_out)
    assert not entry.price_derived
    assert entry.rate_limit.requests_per_minute == requests_per_minute
    assert not entry.rate_limit.derived
    assert (entry.rate_limit.burst_factor, entry.rate_limit.burst_s) == (2, 10)


def test_prices_and_limits_that_no_document_gives(catalog: Catalog) -> None:
    smallest, seven = catalog.get("zen-600m"), catalog.get("zen-7b")
    assert smallest.price == seven.price
    assert smallest.price_derived
    assert catalog.get("smollm2-135m").price == smallest.price
    assert catalog.get("smollm2-135m").price_derived

    between = catalog.get("zen-235b")
    assert between.price_derived
    assert between.rate_limit.derived
    # log-log between (72B, 0.004) and (480B, 0.015) by floating point: 0.009121…; limits 200 and 50: 84.2…
    assert between.price.input_usd_per_1k == Decimal("0.00912")
    assert between.rate_limit.requests_per_minute == 84

    above = catalog.get("zen4-ultra")  # 1T: the line through 72B and 480B goes on
    assert above.price.input_usd_per_1k == Decimal("0.0250")
    assert above.rate_limit.requests_per_minute == 29


def test_prices_rise_and_limits_fall_with_size(catalog: Catalog) -> None:
    entries = list(catalog)
    assert [e.parameters.total for e in entries] == sorted(e.parameters.total for e in entries)
    for small, large in pairwise(entries):
        assert small.price.input_usd_per_1k <= large.price.input_usd_per_1k
        assert small.price.output_usd_per_1k <= large.price.output_usd_per_1k
        assert small.rate_limit.requests_per_minute >= large.rate_limit.requests_per_minute
        assert small.price.cached_input_usd_per_1k * 2 == small.price.input_usd_per_1k


@pytest.mark.parametrize(("quantization", "gigabytes"), [("fp16", 144), ("int8", 72), ("int4", 36), ("q4_k_m", 40)])
def test_memory_of_zen_72b_is_hip_39s(catalog: Catalog, quantization: str, gigabytes: int) -> None:
    need = catalog.get("zen-72b").quantization(quantization)
    assert need.memory_bytes == pytest.approx(gigabytes * B, rel=1e-3)


def test_every_claimed_memory_follows_from_the_claimed_parameters(catalog: Catalog) -> None:
    bytes_per_parameter = {"fp32": 4.0} | {f.name: f.bytes_per_parameter for f in catalog.family.formats}
    checked = 0
    for entry in catalog:
        for claim in entry.claims.memory:
            each = bytes_per_parameter[claim.quantization]
            assert claim.total_gb * B == pytest.approx(entry.parameters.total * each, rel=1e-3)
            if claim.active_gb:
                assert claim.active_gb * B == pytest.approx(entry.parameters.active * each, rel=1e-3)
            checked += 1
    assert checked == 24


def test_layouts_that_hip_39_gives_follow_from_the_rule_for_the_others(catalog: Catalog) -> None:
    layouts = {n: catalog.get(n).serving for n in ("zen-32b", "zen-72b", "zen-480b")}
    assert not any(serving.derived for serving in layouts.values())
    assert {n: (s.tensor_parallel, s.pipeline_parallel) for n, s in layouts.items()} == {
        "zen-32b": (2, 1),
        "zen-72b": (4, 1),
        "zen-480b": (8, 2),
    }
    same_size = {"zen-32b": "zen4-pro", "zen-480b": "zen-coder"}
    for given, derived in same_size.items():
        other = catalog.get(derived).serving
        assert other.derived
        assert (other.tensor_parallel, other.pipeline_parallel) == (
            layouts[given].tensor_parallel,
            layouts[given].pipeline_parallel,
        )
        assert other.max_batch_size == layouts[given].max_batch_size
    for entry in catalog:
        if entry.serving.derived:
            weights = entry.quantization(entry.serving.quantization).memory_bytes
            assert weights <= entry.serving.gpus * catalog.family.serving.weights_bytes_per_gpu


def test_a_variant_is_its_base_with_differences(catalog: Catalog) -> None:
    base, long = catalog.get("zen-72b"), catalog.get("zen-72b-long")
    assert long.variant_of == "zen-72b"
    assert long.context_tokens == 1048576
    assert long.yarn is not None
    assert long.yarn.factor * long.yarn.original_tokens == 1048576
    assert (long.price, long.rate_limit, long.dimensions) == (base.price, base.rate_limit, base.dimensions)
    assert base.claims.scores
    assert not long.claims.scores, "scores of the base were not measured on the variant"
    assert {e.name for e in catalog.variants_of("zen-72b")} == {"zen-72b-long", "zen-72b-vision"}


def test_lora_defaults_and_routing_tables_are_hip_39s(catalog: Catalog) -> None:
    family = catalog.family
    assert (family.lora.rank_min, family.lora.rank_max, family.lora.rank, family.lora.alpha_per_rank) == (8, 256, 64, 2)
    assert list(family.lora.target_modules) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert [(rule.pattern, rule.model) for rule in family.auto.rules] == [
        ("classify|label|yes_no", "zen-7b"),
        ("summarize|translate|explain", "zen-32b"),
        ("code|debug|refactor", "zen-72b"),
        ("research|agent|multi_step", "zen-235b"),
    ]
    assert (family.auto.name, family.auto.fallback) == ("zen-auto", "zen-32b")
    assert family.failover.cascade == ("zen-480b", "zen-235b", "zen-72b", "zen-32b")
    assert family.auto.name not in catalog
    assert family.prefix_cache.max_prefix_tokens == 4096
    assert (family.tokenizer_entries, family.embedding_rows) == (151_936, 152_064)


def test_unknown_name_lists_the_nearest(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match=r"'zen-72'.*Did you mean 'zen-72b'\?") as caught:
        catalog.get("zen-72")
    assert caught.value.status == 404
    assert caught.value.param == "model"


USER_MODEL = """\
name: my-model
family: mine
summary: A model of my own.
parameters: {total: 1_200_000_000, active: 1_200_000_000}
context_tokens: 4096
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_users_model_gets_what_it_leaves_out(tmp_path: Path, catalog: Catalog) -> None:
    path = write(tmp_path, "mine.yaml", USER_MODEL)
    mine = Catalog.load([tmp_path]).get("my-model")
    assert mine.file == str(path)
    assert mine.price == catalog.get("zen-7b").price
    assert mine.price_derived
    assert mine.serving.gpus == 1
    assert mine.default_max_tokens == 2048
    assert mine.quantization("bf16").memory_bytes == 2_400_000_000


def test_a_users_price_counts_for_his_model_only(tmp_path: Path, catalog: Catalog) -> None:
    write(
        tmp_path,
        "mine.yaml",
        USER_MODEL.replace("1_200", "100_000") + "price: {input_usd_per_1k: 9, output_usd_per_1k: 10.5}\n",
    )
    loaded = Catalog.load([tmp_path])
    mine = loaded.get("my-model").price
    assert (mine.input_usd_per_1k, mine.cached_input_usd_per_1k, mine.output_usd_per_1k) == (
        Decimal(9),
        Decimal("4.5"),
        Decimal("10.5"),
    )
    assert not loaded.get("my-model").price_derived
    assert {e.name: e.price for e in catalog} == {e.name: e.price for e in loaded if e.name != "my-model"}


def test_a_users_variant_of_a_packaged_model(tmp_path: Path) -> None:
    write(
        tmp_path,
        "short.yaml",
        "name: zen-480b-short\nvariant_of: zen-480b\ndiffers: No YaRN.\nsummary: Short.\ncontext_tokens: 131072\n",
    )
    short = Catalog.load([tmp_path]).get("zen-480b-short")
    assert (short.context_tokens, short.yarn) == (131072, None)


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("context_tokens", "context_token", r"mine\.yaml:5: unknown key 'context_token'\. .*'context_tokens'"),
        ("4096", "four", r"mine\.yaml:5: context_tokens: "),
        ("active: 1_2", "active: 9_2", r"mine\.yaml:4: parameters: .*active 9,200,000,000 is above total 1,2"),
        ("my-model", "My Model", r"mine\.yaml:1: name: .*'My Model' cannot be a model name"),
        (USER_MODEL, "[1, 2]", r"mine\.yaml: expected keys and values, got list"),
        (USER_MODEL, "name: [", r"mine\.yaml:1: not valid YAML"),
        (USER_MODEL, "", r"mine\.yaml: key 'name' is missing"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path, written: str, instead: str, message: str) -> None:
    write(tmp_path, "mine.yaml", USER_MODEL.replace(written, instead))
    with pytest.raises(InvalidDocument, match=message):
        Catalog.load([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name: again", r"mine\.yaml:6: key 'name' is already on line 1"),
        ("quantizations: [int9]", r"mine\.yaml: unknown quantization 'int9'\. Did you mean 'int\d'"),
        ("serving: {quantization: f, gpu_memory_bytes: 1, max_batch_size: 1}", r"unknown quantization 'f'"),
        ("price: {input_usd_per_1k: -1, output_usd_per_1k: 1}", r"mine\.yaml:6: price\.input_usd_per_1k"),
        (
            "price: {input_usd_per_1k: 1, output_usd_per_1k: 1, cached_input_usd_per_1k: 2}",
            r"mine\.yaml:6: price: .*2 is above",
        ),
        ("yarn: {factor: 4, original_tokens: 4096}", r"yarn reaches 16,384 tokens, but context_tokens is 4,096"),
        ("sources: [{wheel: x==1}]", r"mine\.yaml:6: sources\.0: .*wheel and file come together"),
        ("sources: [{hub: a/b, wheel: x==1, file: f}]", r"sources\.0: .*either hub or wheel"),
        (
            "dimensions: {vocab_size: 1, hidden_size: 8, layers: 1, heads: 3, kv_heads: 2, head_dim: 4, ffn_width: 8}",
            r"mine\.yaml:6: dimensions: .*heads 3 is not a multiple of kv_heads 2",
        ),
        (
            "expert_groups: [{name: code, first: 4, last: 3}]",
            r"mine\.yaml:1: .*expert group 'code' 4…3",
        ),
    ],
)
def test_a_wrong_line_is_refused_where_it_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, "mine.yaml", USER_MODEL + line + "\n")
    with pytest.raises(InvalidDocument, match=message):
        Catalog.load([tmp_path])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("variant_of: zen-72\n", r"mine\.yaml: variant_of names 'zen-72'.*Did you mean 'zen-72b'\?"),
        ("variant_of: zen-72b-long\n", r"'zen-72b-long', which no file defines as a model of its own"),
        ("variant_of: zen-72b\nprice: 3\n", r"mine\.yaml:5: unknown key 'price'"),
        (
            "variant_of: zen-72b\ncontext_tokens: 262144\nyarn: {factor: 4, original_tokens: 131072}\n",
            r"mine\.yaml: x: yarn reaches 524,288 tokens, but context_tokens is 262,144",
        ),
    ],
)
def test_a_wrong_variant_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    write(tmp_path, "mine.yaml", "name: x\ndiffers: d\nsummary: s\n" + lines)
    with pytest.raises(InvalidDocument, match=message):
        Catalog.load([tmp_path])


def test_a_name_given_twice_names_both_files(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", USER_MODEL)
    write(tmp_path, "b.yaml", USER_MODEL)
    with pytest.raises(InvalidDocument, match=r"b\.yaml: the name 'my-model' is already given by .*a\.yaml"):
        Catalog.load([tmp_path])


def test_a_packaged_name_cannot_be_taken(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", USER_MODEL.replace("my-model", "zen-7b"))
    with pytest.raises(InvalidDocument, match=r"a\.yaml: the name 'zen-7b' is already given by .*zen-7b\.yaml"):
        Catalog.load([tmp_path])


def test_the_name_of_automatic_routing_cannot_be_taken(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", USER_MODEL.replace("my-model", "zen-auto"))
    with pytest.raises(InvalidDocument, match=r"a\.yaml: the name 'zen-auto' stands for automatic routing"):
        Catalog.load([tmp_path])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="no such folder"):
        Catalog.load([tmp_path / "nowhere"])


def test_every_packaged_file_is_named_for_its_model(catalog: Catalog) -> None:
    assert {Path(entry.file).stem for entry in catalog} == set(catalog.names())
    assert len(catalog) == len(catalog.names()) == 30
