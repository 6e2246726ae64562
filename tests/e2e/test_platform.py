"""A user's way through the platform, with a real model on vLLM."""

from __future__ import annotations

import json
import re
import time

import openai
import pytest

from tests.e2e.platform import REAL, SCRIPTED, TestPlatform, charge_of, wait_until

pytestmark = pytest.mark.e2e
QUESTION = "What is the capital of France?"


def ask(client: openai.OpenAI, content: str, *, model: str = REAL, **options: object) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, **{"max_tokens": 24, **options}
    )
    return answer.choices[0].message.content or ""


def reference_text(platform: TestPlatform, question: str, max_tokens: int, *, model: str = REAL) -> str:
    """Greedy text of `transformers` itself on the deployed weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zenray.model.hf import register

    register()
    (config,) = (platform.home.cache / "weights" / model).rglob("config.json")
    folder = config.parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = network.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text_equals_transformers(platform: TestPlatform) -> None:
    client = platform.customer("parity")
    assert ask(client, QUESTION) == reference_text(platform, QUESTION, 24)


def test_an_answer_is_billed_to_the_nano_dollar(platform: TestPlatform) -> None:
    client = platform.customer("billing", usd="1")
    whole = client.chat.completions.create(
        model=REAL, messages=[{"role": "user", "content": QUESTION}], max_tokens=8, temperature=0
    )
    streamed = client.chat.completions.create(
        model=REAL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    usages = [whole.usage, chunks[-1].usage]
    sql = "SELECT * FROM usage_events WHERE org = 'billing' ORDER BY at"
    rows = wait_until(lambda: len(found := platform.rows(sql)) == 2 and found, "both events in the ledger", 60)
    for row, usage in zip(rows, usages, strict=True):
        assert usage is not None
        assert (row["input_tokens"], row["output_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
        details = usage.prompt_tokens_details
        assert row["cached_input_tokens"] == ((details.cached_tokens if details else None) or 0)
        assert row["cost_nano_usd"] == charge_of(
            row["price"], usage.prompt_tokens, row["cached_input_tokens"], usage.completion_tokens
        )
    balance = platform.control().get("/admin/orgs/billing/balance")["balance_nano_usd"]
    assert balance == 10**9 - sum(row["cost_nano_usd"] for row in rows)
    assert json.loads(platform.zenray("usage", "billing", "--json"))[0]["requests"] == 2


def test_status_shows_what_is_deployed(platform: TestPlatform) -> None:
    shown = platform.zenray("status")
    assert REAL in shown and "ready" in shown


@pytest.mark.parametrize("model", [SCRIPTED, REAL])
def test_chat_on_the_command_line(model: str, platform: TestPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question from a pipe, streamed; its count of tokens is what is billed. No temperature: the model's own."""
    org = f"talker-{model.partition('-')[0]}"
    client = platform.customer(org)
    monkeypatch.setitem(platform._environment, "ZENRAY_API_KEY", client.api_key)
    question = "[[tokens=5]]" if model == SCRIPTED else "Answer with one word: what is the capital of France?"
    *answer, counts = platform.zenray("chat", model, stdin=question + "\n").splitlines()
    said = re.fullmatch(r"(\d+) \+ (\d+) tokens, \d+ tokens/s", counts)
    assert said and "".join(answer).strip()
    if model == SCRIPTED:
        assert "\n".join(answer) == ask(client, question, model=SCRIPTED)
    sql = "SELECT * FROM usage_events WHERE org = ? ORDER BY at"
    row = wait_until(lambda: platform.rows(sql, org), "the answer is in the ledger", 60)[0]
    assert (row["input_tokens"], row["output_tokens"]) == (int(said[1]), int(said[2]))


def test_a_revoked_key_stops_within_two_seconds(platform: TestPlatform) -> None:
    client = platform.customer("leaver")
    assert ask(client, "[[tokens=2]]", model=SCRIPTED)
    key_id = platform.rows("SELECT key_id FROM api_keys WHERE org = 'leaver'")[0]["key_id"]
    platform.zenray("keys", "revoke", key_id)
    began_s = time.monotonic()
    with pytest.raises(openai.AuthenticationError):
        while time.monotonic() - began_s < 2:
            ask(client, "[[tokens=2]]", model=SCRIPTED)
            time.sleep(0.05)


def test_without_credit_no_token_is_made(platform: TestPlatform) -> None:
    client = platform.customer("poor", usd=None)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, QUESTION)
    assert refused.value.code == "insufficient_quota"
    assert platform.rows("SELECT * FROM usage_events WHERE org = 'poor'") == []


def test_a_model_out_of_scope_unknown_or_not_deployed_is_refused(platform: TestPlatform) -> None:
    client = platform.customer("narrow", scopes=("smollm2-*", "zen-7b"))
    with pytest.raises(openai.PermissionDeniedError):
        ask(client, "[[tokens=2]]", model=SCRIPTED)
    with pytest.raises(openai.NotFoundError, match=REAL):
        ask(client, QUESTION, model="smollm2-135")
    with pytest.raises(openai.NotFoundError):
        ask(client, QUESTION, model="zen-7b")


def test_a_corrupt_shard_fails_the_deployment_naming_the_file(platform: TestPlatform) -> None:
    from zenray.spec.platform import StorageSettings
    from zenray.spec.versions import VersionRef
    from zenray.storage.opening import open_store
    from zenray.storage.versions import publish

    folder = platform.home.root / "bad"
    folder.mkdir()
    (folder / "script.json").write_text('{"tokens": 3}')
    (folder / "shard.bin").write_bytes(b"x" * 4096)
    store = open_store(StorageSettings(uri=f"file:{platform.home.root / 'store'}"))
    ref = VersionRef(model=SCRIPTED, version="v2-bad")
    publish(store, ref, folder)
    stored = platform.home.root / "store" / ref.prefix / "shard.bin"
    stored.chmod(0o644)
    stored.write_bytes(b"x" * 4095 + b"y")
    assert "shard.bin" in platform.zenray("models", "verify", f"{SCRIPTED}@v2-bad", check=False)

    client = platform.customer("steady")
    spec = platform.home.root / "bad.yaml"
    spec.write_text(f"model: {SCRIPTED}\nversion: v2-bad\nengine: {{kind: scripted}}\ngraceful_shutdown_timeout_s: 5\n")
    said = platform.zenray("deploy", str(spec), check=False)
    assert "shard.bin" in said, said
    assert ask(client, "[[tokens=2]]", model=SCRIPTED), "the revision that served goes on serving"
    spec.write_text(f"model: {SCRIPTED}\nversion: v1\nengine: {{kind: scripted}}\ngraceful_shutdown_timeout_s: 5\n")
    platform.zenray("deploy", str(spec))


def test_a_typo_in_a_file_names_the_line_and_the_nearest_key(platform: TestPlatform) -> None:
    spec = platform.home.root / "typo.yaml"
    spec.write_text(f"model: {REAL}\nautoscaling:\n  min_replica: 1\n")
    said = platform.zenray("deploy", str(spec), check=False)
    assert "typo.yaml:3" in said and "'min_replicas'" in said


def test_a_second_platform_in_the_same_folder_is_refused(platform: TestPlatform) -> None:
    assert "already runs" in platform.zenray("up", "-f", str(platform.file), check=False)
