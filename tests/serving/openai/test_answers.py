"""What the endpoint answers is what the library answers, token for token."""

import asyncio

import httpx
import pytest
import torch

import kvedit as kv
from kvedit.editors import Suppress
from kvedit.models import load
from kvedit.serving.openai import Limits, create_app

PROMPT = " So how long may I wait"
TURN = [{"role": "user", "content": "How long may I wait?"}]
SAMPLING = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
NAMES = ("plain", "biased", "gaps", "chat", "other/one")


def text_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_completions_go_on_as_text(loaded, memories, ask):
    bodies = [
        {"model": name, "prompt": PROMPT, "max_tokens": 12, **more}
        for name in NAMES
        for more in ({}, SAMPLING, {"temperature": 0, "top_p": 0.5}, {"top_k": 3, "seed": 1})
    ]
    answers = ask(*[("completions", body) for body in bodies])
    texts = {}
    for body, answer in zip(bodies, answers, strict=True):
        given = {n: body[n] for n in ("temperature", "top_p", "top_k", "seed") if n in body}
        if given.get("temperature") == 0:
            given = {}
        expected = kv.generate(
            *loaded, memories[body["model"]], PROMPT, chat=False, max_new_tokens=12, **given
        )
        assert text_of(answer) == expected, body
        texts.setdefault(body["model"], []).append(expected)
    assert len({tuple(found) for found in texts.values()}) == len(NAMES)
    assert all(greedy != sampled for greedy, sampled, *_ in texts.values())


@pytest.mark.parametrize("name", NAMES)
def test_chats_go_on_with_a_turn(loaded, memories, ask, name):
    more = ({}, SAMPLING, {"max_completion_tokens": 5})
    turns = (
        [[{"role": "system", "content": "Be brief."}, *TURN], TURN] if name != "chat" else [TURN]
    )
    for messages in turns:
        bodies = [{"model": name, "messages": messages, "max_tokens": 10} | one for one in more]
        bodies[2].pop("max_tokens")
        answers = ask(*[("chat/completions", body) for body in bodies])
        for given, count, answer in zip(({}, SAMPLING, {}), (10, 10, 5), answers, strict=True):
            expected = kv.generate(*loaded, memories[name], messages, max_new_tokens=count, **given)
            assert text_of(answer) == expected


def test_prompts_of_ids_and_several_prompts(loaded, memories, ask):
    model, tokenizer = loaded
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, " No")]
    single, texts, lists = ask(
        ("completions", {"model": "gaps", "prompt": ids[0], "max_tokens": 9}),
        ("completions", {"model": "gaps", "prompt": [PROMPT, " No"], "max_tokens": 9}),
        ("completions", {"model": "gaps", "prompt": ids, "max_tokens": 9}),
    )
    expected = [
        kv.generate(model, tokenizer, memories["gaps"], one, max_new_tokens=9) for one in ids
    ]
    assert text_of(single) == expected[0]
    for answer in (texts, lists):
        choices = answer.json()["choices"]
        assert [choice["text"] for choice in choices] == expected
        assert [choice["index"] for choice in choices] == [0, 1]
    slots = memories["gaps"].slots
    prompt = 2 * slots + sum(map(len, ids))
    assert lists.json()["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 18,
        "total_tokens": prompt + 18,
        "prompt_tokens_details": {"cached_tokens": 2 * slots},
    }


def test_the_plain_model_answers_under_its_own_name(loaded, ask):
    model, tokenizer = loaded
    text, chat = ask(
        ("completions", {"model": model.name_or_path, "prompt": "The handbook", "max_tokens": 8}),
        ("chat/completions", {"model": model.name_or_path, "messages": TURN, "max_tokens": 8}),
    )
    ids = tokenizer("The handbook", return_tensors="pt")["input_ids"]
    rendered = tokenizer.apply_chat_template(TURN, tokenize=False, add_generation_prompt=True)
    turn = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for answer, prompt in ((text, ids), (chat, turn)):
        made = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert text_of(answer) == tokenizer.decode(made, skip_special_tokens=True)
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == prompt.shape[1]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert int(ids[0, 0]) == tokenizer.bos_token_id


def test_streams_say_the_same(loaded, memories, ask, chunks):
    body = {"prompt": PROMPT, "max_tokens": 12, "stream": True}
    chat = {"messages": TURN, "max_tokens": 12, "stream": True, **SAMPLING}
    usage = {"stream_options": {"include_usage": True}}
    text, turn, several = ask(
        ("completions", {"model": "biased", **body}),
        ("chat/completions", {"model": "chat", **chat, **usage}),
        ("completions", {"model": "biased", **body, "prompt": [PROMPT, " No"], **usage}),
    )
    assert text.headers["content-type"].startswith("text/event-stream")
    found = chunks(text.text)
    expected = kv.generate(*loaded, memories["biased"], PROMPT, max_new_tokens=12)
    assert "".join(one["choices"][0]["text"] for one in found) == expected
    assert len(found) > 5
    assert [one["choices"][0]["finish_reason"] for one in found] == [None] * (len(found) - 1) + [
        "length"
    ]
    assert "usage" not in found[0]

    first, *middle, last, counts = chunks(turn.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    expected = kv.generate(*loaded, memories["chat"], TURN, max_new_tokens=12, **SAMPLING)
    said = [one["choices"][0]["delta"].get("content", "") for one in (*middle, last)]
    assert "".join(said) == expected
    assert last["choices"][0]["finish_reason"] == "length"
    assert counts["choices"] == []
    assert counts["usage"]["completion_tokens"] == 12
    cached = counts["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == memories["chat"].slots
    assert {one["object"] for one in (first, last, counts)} == {"chat.completion.chunk"}
    assert len({one["id"] for one in (first, *middle, last, counts)}) == 1

    *pieces, counts = chunks(several.text)
    for index, prompt in enumerate((PROMPT, " No")):
        expected = kv.generate(*loaded, memories["biased"], prompt, max_new_tokens=12)
        mine = [one["choices"][0] for one in pieces if one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == expected
    assert counts["usage"]["completion_tokens"] == 24


def test_stop_strings_end_an_answer_and_are_not_said(loaded, memories, ask, chunks):
    whole = kv.generate(*loaded, memories["plain"], PROMPT, max_new_tokens=30)
    for stop in (whole[6:9], whole[3:5]):
        stops = ["never said", stop]
        body = {"model": "plain", "prompt": PROMPT, "max_tokens": 30, "stop": stops}
        quiet, stream = ask(("completions", body), ("completions", body | {"stream": True}))
        expected = kv.generate(*loaded, memories["plain"], PROMPT, max_new_tokens=30, stop=stops)
        assert expected == whole.split(stop)[0]
        assert text_of(quiet) == expected
        assert quiet.json()["choices"][0]["finish_reason"] == "stop"
        found = [one["choices"][0] for one in chunks(stream.text)]
        assert "".join(one["text"] for one in found) == expected
        assert found[-1]["finish_reason"] == "stop"


def test_an_end_token_ends_an_answer(loaded, memories, ask, monkeypatch):
    model, tokenizer = loaded
    with kv.attach(model, memories["plain"], tokenizer) as session:
        tokens = session.generate(PROMPT, max_new_tokens=10).tokens
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[4], 2])
    first = tokens.index(tokens[4])
    (answer,) = ask(("completions", {"model": "plain", "prompt": PROMPT, "max_tokens": 10}))
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] == first + 1


@pytest.mark.parametrize("name", ["plain", "biased", "gaps"])
def test_logprobs_are_the_models(loaded, memories, ask, chunks, name):
    model, tokenizer = loaded
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "logprobs": 3, **SAMPLING}
    turn = {"model": name, "messages": TURN, "max_tokens": 8, "logprobs": True, "top_logprobs": 4}
    text, stream, chat, bare = ask(
        ("completions", body),
        ("completions", body | {"stream": True}),
        ("chat/completions", turn),
        ("completions", body | {"logprobs": 0}),
    )
    with kv.attach(model, memories[name], tokenizer) as session:
        made = session.generate(PROMPT, max_new_tokens=8, **SAMPLING).tokens
    (score,) = kv.score(model, tokenizer, memories[name], PROMPT, [list(made)])
    found = text.json()["choices"][0]["logprobs"]
    assert found["tokens"] == [tokenizer.decode([one]) for one in made]
    assert found["token_logprobs"] == pytest.approx(score.logprobs.tolist(), abs=1e-4)
    best = score.logits.log_softmax(-1).topk(3)
    for top, values, ids, token in zip(
        found["top_logprobs"], best.values, best.indices, found["tokens"], strict=True
    ):
        likely = {
            tokenizer.decode([i]): v for i, v in zip(ids.tolist(), values.tolist(), strict=True)
        }
        assert {k: v for k, v in top.items() if k in likely} == pytest.approx(likely, abs=1e-4)
        assert set(top) - set(likely) <= {token}
    whole = tokenizer.decode(made, skip_special_tokens=True)
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        assert whole[start:].startswith(token)
    parts = [one["choices"][0]["logprobs"] for one in chunks(stream.text)]
    streamed = [part for part in parts if part is not None]
    for key in found:
        assert [part[key][0] for part in streamed] == found[key]
    rows = chat.json()["choices"][0]["logprobs"]["content"]
    assert len(rows) == 8
    for row in rows:
        assert row["logprob"] == row["top_logprobs"][0]["logprob"]  # greedy
        assert bytes(row["bytes"]).decode() == row["token"]
        assert len(row["top_logprobs"]) == 4
    assert all(len(top) == 1 for top in bare.json()["choices"][0]["logprobs"]["top_logprobs"])


def test_logprobs_do_not_see_the_models_own_penalties(loaded, memories, ask, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 8, "logprobs": 1}
    (answer,) = ask(("completions", body))
    with kv.attach(model, memories["plain"], tokenizer) as session:
        made = session.generate(PROMPT, max_new_tokens=8).tokens
    (score,) = kv.score(model, tokenizer, memories["plain"], PROMPT, [list(made)])
    found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert found == pytest.approx(score.logprobs.tolist(), abs=1e-4)


def test_versions_digests_and_names_that_move(loaded, memories, store, app, served):
    old = memories["plain"]
    new = Suppress(span="Refunds are possible", strength=3)(old)
    texts = [kv.generate(*loaded, one, PROMPT, max_new_tokens=10) for one in (old, new)]
    assert texts[0] != texts[1]

    async def run():
        async with served(app) as client:

            async def ask(name):
                body = {"model": name, "prompt": PROMPT, "max_tokens": 10}
                answer = (await client.post("/v1/completions", json=body)).json()
                return answer["choices"][0]["text"], answer["system_fingerprint"]

            first = store.show("plain").record
            assert await ask("plain") == (texts[0], f"kv_{first.record[:16]}")
            second = store.put(new, "plain")
            assert await ask("plain") == (texts[1], f"kv_{second.record[:16]}")
            for name in ("plain@{1}", first.record, first.record[:12], first.content):
                assert (await ask(name))[0] == texts[0], name
            listed = (await client.get("/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == [loaded[0].name_or_path, *sorted(memories)]
            mine = next(one for one in listed if one["id"] == "plain")
            assert mine["memory"]["record"] == second.record
            one = (await client.get("/v1/models/other/one")).json()
            assert one["memory"]["slots"] == memories["other/one"].slots
            back = (await client.get("/v1/models/plain@{1}")).json()
            assert back["memory"]["record"] == first.record
            health = (await client.get("/health")).json()
            assert (health["status"], health["memories"]) == ("ok", 2)

    asyncio.run(run())


def test_memories_are_kept_within_the_budget(loaded, memories, store, served):
    size = max(one.nbytes for one in memories.values()) + 20000
    apps = [create_app(*loaded, store, limits=Limits(cache=cache)) for cache in (0, size)]

    async def run(app):
        async with served(app) as client:
            held = []
            for name in ("plain", "plain", "other/one", "plain"):
                body = {"model": name, "prompt": PROMPT, "max_tokens": 1}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
                held.append((await client.get("/health")).json())
            return held

    assert {one["memories"] for one in asyncio.run(run(apps[0]))} == {0}
    held = asyncio.run(run(apps[1]))
    assert {one["memories"] for one in held} == {1}
    assert all(0 < one["bytes"] <= size for one in held)


def test_without_a_count_a_chat_gets_what_fits(loaded, store, ask):
    model, tokenizer = load(loaded[0].name_or_path)
    model.config.max_position_embeddings = 48
    turn = {"model": model.name_or_path, "messages": TURN}
    app = create_app(model, tokenizer, store)
    free, exact = ask(
        ("chat/completions", turn), ("chat/completions", turn | {"max_tokens": 40}), app=app
    )
    usage = free.json()["usage"]
    assert usage["total_tokens"] == 49  # the last token is never fed
    assert usage["completion_tokens"] > 5
    assert exact.status_code == 400
    assert exact.json()["error"]["code"] == "context_length_exceeded"
    small = create_app(*loaded, store, limits=Limits(tokens=6))
    (answer,) = ask(("chat/completions", turn), app=small)
    assert answer.json()["usage"]["completion_tokens"] == 6


def test_requests_leave_the_model_as_it_was(loaded, ask):
    model, _ = loaded
    before = torch.random.get_rng_state(), model.config._attn_implementation
    ask(
        ("completions", {"model": "biased", "prompt": PROMPT, "logprobs": 2, **SAMPLING}),
        ("completions", {"model": "biased", "prompt": [99999], "logprobs": 2}),
    )
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert model.config._attn_implementation == before[1]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_key_is_asked_for(loaded, store, served):
    app = create_app(*loaded, store, key="geheim–1")
    headers = ("", "Bearer falsch", "Bearer geheim–1", "Bearer geheim", "geheim–1", "Bearer \xef")

    async def run():
        async with served(app) as client:
            statuses = []
            for header in headers:
                sent = {"Authorization": header.encode()} if header else {}
                statuses.append((await client.get("/v1/models", headers=sent)).status_code)
            return statuses, (await client.get("/health")).status_code

    assert asyncio.run(run()) == ([401, 401, 200, 401, 401, 401], 200)


def test_other_host_names_are_refused_unless_any_may_ask(loaded, store, app):
    async def ask(app, url):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport) as client:
            return (await client.get(url)).status_code

    for url in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:80"):
        assert asyncio.run(ask(app, f"{url}/health")) == 200
    assert asyncio.run(ask(app, "http://rebound.example/health")) == 403
    everywhere = create_app(*loaded, store, hosts=None)
    assert asyncio.run(ask(everywhere, "http://rebound.example/health")) == 200
