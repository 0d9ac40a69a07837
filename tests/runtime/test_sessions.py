"""Sessions: turns, rows, raw calls, several at once; and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize
from kvedit.errors import (
    ContextTooLong,
    InvalidArgument,
    TemplateNotCuttable,
    UnsupportedModel,
)
from kvedit.models.cache_argument import cache_argument

TEXT = "The refund window is 60 days. Shipping is free for members."
CHAT = [{"role": "system", "content": TEXT}]


def _ids(tokens, seed=0, rows=1):
    return torch.randint(10, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss", "cohere2"])
def test_three_turns_equal_one_long_prompt(tiny, family):
    model, tokenizer = tiny(family)
    context, turns = _ids(20)[0], [_ids(5, seed)[0] for seed in (1, 2, 3)]
    memory = kv.capture(model, None, context)
    before = memory.digest
    said, spoken = [], context.tolist()
    with kv.attach(model, memory) as session:
        for turn in turns:
            reply = session.generate(turn, max_new_tokens=6)
            spoken += turn.tolist()
            whole = torch.tensor([spoken])
            plain = model.generate(
                whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False
            )[0, len(spoken) :].tolist()
            said.append((list(reply.tokens), plain))
            spoken += list(reply.tokens)
    for found, expected in said:
        assert found == expected
    assert memory.digest == before


def test_a_grown_session_becomes_a_memory_equal_to_a_capture(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    with kv.attach(model, memory, tokenizer) as session:
        reply = session.generate(" Then", max_new_tokens=5)
        grown = session.memory()
    assert torch.equal(grown.tokens[-5:], torch.tensor(reply.tokens))
    again = kv.capture(model, None, grown.tokens)
    for index, layer in again.layers.items():
        torch.testing.assert_close(layer.keys, grown.layers[index].keys, atol=2e-5, rtol=0)
    assert grown.next_position == len(grown.tokens)
    assert grown.source.text.startswith(TEXT + " Then")
    assert [node.operation for node in grown.lineage.nodes] == ["capture", "grow"]
    assert grown.find(" Then").ranges[0][0] == len(memory.tokens)


def test_a_grown_memory_keeps_bias_and_gaps(tiny):
    model, tokenizer = tiny("llama")
    memory = Drop(span="Shipping", layers=(1,))(
        Emphasize(span="60 days", strength=1.0)(kv.capture(model, tokenizer, TEXT))
    )
    with kv.attach(model, memory, tokenizer) as session:
        session.generate(" So", max_new_tokens=4)
        grown = session.memory()
        expected = session.forward(torch.tensor([[50, 51]]))
    assert torch.equal(grown.layers[0].bias[:, : memory.layers[0].slots], memory.layers[0].bias)
    assert grown.layers[0].slots - grown.layers[1].slots == (
        memory.layers[0].slots - memory.layers[1].slots
    )
    with kv.attach(model, grown) as session:
        found = session.forward(torch.tensor([[50, 51]]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "llama4_text"])
def test_a_batch_of_prompts_equals_single_prompts(tiny, family):
    model, tokenizer = tiny(family)
    memory = Emphasize(span="60 days", strength=1.0)(kv.capture(model, tokenizer, TEXT))
    prompts = [" How long?", " Is shipping free for all of them, or not?", " Why"]
    if family == "llama4_text":
        # It derives positions from the cache's length, so prompts of different length are refused.
        with pytest.raises(UnsupportedModel, match="derives positions"):
            kv.generate(model, tokenizer, memory, prompts, max_new_tokens=8)
        prompts = [" How long?", " How much?"][:1] * 2
    batch = kv.generate(model, tokenizer, memory, prompts, max_new_tokens=8)
    single = [kv.generate(model, tokenizer, memory, p, max_new_tokens=8) for p in prompts]
    assert batch == single


def test_one_prompt_over_several_memories_and_later_turns(tiny):
    model, tokenizer = tiny("llama")
    texts = [TEXT, "A much shorter one.", "The lamps are blue. The clocks are red, and loud."]
    memories = kv.capture(model, tokenizer, texts)
    memories[2] = Emphasize(span="red", strength=2.0)(memories[2])
    memories[0] = Drop(span="Shipping is free")(memories[0])
    with kv.attach(model, memories, tokenizer) as session:
        first = session.generate(" And", max_new_tokens=6)
        second = session.generate([" So", " But then again", " Or"], max_new_tokens=6)
        grown = [session.memory(row) for row in range(3)]
    for row, memory in enumerate(memories):
        with kv.attach(model, memory, tokenizer) as alone:
            assert alone.generate(" And", max_new_tokens=6) == first[row]
            prompt = [" So", " But then again", " Or"][row]
            assert alone.generate(prompt, max_new_tokens=6) == second[row]
            assert torch.equal(alone.memory().tokens, grown[row].tokens)


def test_a_row_that_ends_early_is_not_disturbed_by_padding(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in (" How long?", " Is it")]
    free = kv.generate(model, None, memory, ids, max_new_tokens=8)
    stop = next(i for i in range(1, 5) if free[0][i] not in (*free[1], *free[0][:i]))
    end = free[0][stop]
    with kv.attach(model, memory, rows=2) as session:
        replies = session.generate(ids, max_new_tokens=8, eos_token_id=end)
        assert len(replies[0].tokens) == stop + 1 < len(replies[1].tokens) == 8
        after = session.generate([[60], [61]], max_new_tokens=4)
    with kv.attach(model, memory) as alone:
        alone.generate(ids[0], max_new_tokens=8, eos_token_id=end)
        assert alone.generate([60], max_new_tokens=4) == after[0]


def test_raw_calls_with_the_session_cache(tiny):
    model, tokenizer = tiny("gemma3")
    memory = Emphasize(span="members", strength=1.5)(kv.capture(model, tokenizer, TEXT))
    ids, start = _ids(4), memory.next_position
    with kv.attach(model, memory) as session:
        expected = session.forward(ids)
    at = torch.arange(start, start + 4)[None]
    with kv.attach(model, memory) as session, torch.no_grad():
        raw = model(ids, **{cache_argument(model): session.cache}, position_ids=at).logits
    assert torch.equal(raw, expected)
    with kv.attach(model, memory) as session:  # positional arguments, and a mask of new tokens
        with torch.no_grad():
            raw = model(ids, torch.ones_like(ids), at, session.cache).logits
    assert torch.equal(raw, expected)
    with kv.attach(model, memory) as session:
        slots = session.cache.get_seq_length()
        out = model.generate(
            ids,
            **{cache_argument(model): session.cache},
            position_ids=at,
            do_sample=False,
            attention_mask=torch.ones(1, slots + 4, dtype=torch.int64),
            max_new_tokens=5,
        )
    assert out[0, 4:].tolist() == kv.generate(model, None, memory, ids[0], max_new_tokens=5)


def test_raw_calls_without_or_with_wrong_positions_are_refused(tiny):
    model, tokenizer = tiny("llama")
    memory = Drop(span="Shipping")(kv.capture(model, tokenizer, TEXT))
    with kv.attach(model, memory) as session:
        with pytest.raises(InvalidArgument, match="pass position_ids"):
            model(_ids(3), **{cache_argument(model): session.cache})
        with pytest.raises(InvalidArgument, match="must continue at position"):
            model(
                _ids(3),
                **{cache_argument(model): session.cache},
                position_ids=torch.arange(3)[None],
            )
        with pytest.raises(InvalidArgument, match="must continue at position"):
            # transformers' default counts slots, which are fewer than positions here.
            slots = session.cache.get_seq_length()
            mask = torch.ones(1, slots + 3, dtype=torch.int64)
            model.generate(
                _ids(3),
                **{cache_argument(model): session.cache},
                attention_mask=mask,
                max_new_tokens=2,
            )
        with pytest.raises(InvalidArgument, match="2D attention_mask"):
            model(
                _ids(3),
                **{cache_argument(model): session.cache},
                attention_mask=torch.ones(1, 1, 3, 3),
                position_ids=torch.arange(3)[None],
            )
        with pytest.raises(InvalidArgument, match="rows"):
            model(
                _ids(3, rows=2),
                **{cache_argument(model): session.cache},
                position_ids=torch.arange(3)[None],
            )
        # After all these refusals the session still works.
        assert session.forward(_ids(3)).shape[1] == 3
    with pytest.raises(InvalidArgument, match="closed"):
        model(_ids(1), **{cache_argument(model): session.cache}, position_ids=torch.tensor([[99]]))


def test_sessions_side_by_side_do_not_meet_and_leave_the_model_as_it_was(tiny):
    model, tokenizer = tiny("llama", "eager")
    plain = kv.capture(model, tokenizer, TEXT)
    biased = Emphasize(span="60 days", strength=3.0)(plain)
    ids = _ids(4)
    with torch.no_grad():
        untouched = model(ids).logits
    expected = []
    for memory in (plain, biased):
        with kv.attach(model, memory) as session:
            expected.append(session.forward(ids))
    first, second = kv.attach(model, plain), kv.attach(model, biased)
    a, b = first.__enter__(), second.__enter__()
    half = [a.forward(ids[:, :2]), b.forward(ids[:, :2])]
    with torch.no_grad():  # a plain call in between sees neither
        torch.testing.assert_close(model(ids).logits, untouched, atol=0, rtol=0)
    rest_a = a.forward(ids[:, 2:])
    first.__exit__(None, None, None)  # not in the order of opening
    rest_b = b.forward(ids[:, 2:])
    second.__exit__(None, None, None)
    torch.testing.assert_close(torch.cat((half[0], rest_a), 1), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat((half[1], rest_b), 1), expected[1], atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_hooks_are_gone_after_an_exception(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    with pytest.raises(RuntimeError, match="mine"), kv.attach(model, memory):
        with kv.tap(model, ("keys", "hidden")):
            raise RuntimeError("mine")
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_forward_pass_that_died_is_forgotten(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    ids = _ids(4)
    with kv.attach(model, memory) as session:
        expected = session.forward(ids)

    def fail(layer, tensor):
        raise RuntimeError("halfway") if layer == 1 else None

    with kv.attach(model, memory) as session:
        with pytest.raises(RuntimeError, match="halfway"):
            with kv.tap(model, layers=[1], replace={"values": fail}):
                session.forward(ids)
        torch.testing.assert_close(session.forward(ids), expected, atol=0, rtol=0)


def test_a_row_that_meets_a_stop_string_first_is_not_padded(tiny):
    """Row by row, and in what comes next, a batch is its rows alone."""
    model, tokenizer = tiny("llama")
    memories = [kv.capture(model, tokenizer, text) for text in (TEXT, TEXT + " Or not?")]
    prompts = [" Then", " And"]
    with kv.attach(model, memories, tokenizer) as session:
        free = session.generate(prompts, max_new_tokens=12)
    stop = next(
        one
        for one in (free[0].text[i : i + 2] for i in range(2, 12))
        if one.strip() and one not in free[1].text
    )
    with kv.attach(model, memories, tokenizer) as session:
        replies = session.generate(prompts, max_new_tokens=12, stop=stop)
        slots = [session.memory(row).slots for row in range(2)]
        again = session.generate(" So", max_new_tokens=4)
    assert len(replies[0].tokens) < len(replies[1].tokens) == 12
    for row, (memory, prompt) in enumerate(zip(memories, prompts, strict=True)):
        with kv.attach(model, memory, tokenizer) as session:
            alone = session.generate(prompt, max_new_tokens=12, stop=stop)
            assert replies[row] == alone
            assert slots[row] == session.memory().slots
            assert again[row] == session.generate(" So", max_new_tokens=4)


def test_stop_strings_streaming_and_sampling(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    pieces = []
    full = kv.generate(model, tokenizer, memory, " Then", max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == full
    stop = full[3:6]
    with kv.attach(model, memory, tokenizer) as session:
        reply = session.generate(" Then", max_new_tokens=12, stop=stop)
    assert reply.text == full.split(stop)[0]
    state = torch.get_rng_state()
    sampled = [
        kv.generate(model, tokenizer, memory, " Then", max_new_tokens=12, temperature=1.0, seed=s)
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidArgument, match="one row"):
        kv.generate(model, tokenizer, memory, [" a", " b"], stream=print)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"attention_mask": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_a_session_cannot_do_is_refused_by_name(tiny, option):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    with kv.attach(model, memory, tokenizer) as session:
        with pytest.raises(UnsupportedModel, match=next(iter(option))):
            session.generate(" Then", **option)


def test_chat_goes_on_as_chat_and_text_as_text(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, CHAT)
    whole = tokenizer.apply_chat_template(
        [*CHAT, {"role": "user", "content": "How long?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    plain = model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False
    )[0, whole.shape[1] :].tolist()
    with kv.attach(model, memory, tokenizer) as session:
        reply = session.generate("How long?", max_new_tokens=6)
        assert list(reply.tokens) == plain
        session.generate("And then?", max_new_tokens=6)
        source = session.source()
    roles = [message.role for message in source.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    rendered = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in source.messages], tokenize=False
    )
    assert rendered.startswith(source.text)
    grown_find = source.messages[3]
    assert source.text[grown_find.start : grown_find.stop] == "And then?"
    # chat=False goes on as text, and a text memory can be asked to go on as a chat.
    with kv.attach(model, memory, tokenizer) as session:
        session.generate("How long?", max_new_tokens=2, chat=False)
        assert "<|im_start|>user" not in session.source().text
    text_memory = kv.capture(model, tokenizer, TEXT)
    with kv.attach(model, text_memory, tokenizer) as session:
        session.generate("How long?", max_new_tokens=2, chat=True)
        assert session.source().text.startswith(TEXT + "<|im_start|>user\nHow long?<|im_end|>")


def test_prompts_may_be_messages_or_ids(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, CHAT)
    text = kv.generate(model, tokenizer, memory, "How long?", max_new_tokens=5)
    turn = [{"role": "user", "content": "How long?"}]
    assert kv.generate(model, tokenizer, memory, turn, max_new_tokens=5) == text
    ids = tokenizer(
        "<|im_start|>user\nHow long?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )["input_ids"]
    assert kv.generate(model, tokenizer, memory, ids, max_new_tokens=5) == text


def test_a_template_that_cannot_be_cut_is_said_so(tiny):
    import copy

    model, tokenizer = tiny("llama")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ messages|length }} messages\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
        "{% endfor %}"
    )
    memory = kv.capture(model, tokenizer, CHAT)
    with kv.attach(model, memory, tokenizer) as session:
        with pytest.raises(TemplateNotCuttable, match="can't be cut"):
            session.generate("How long?")
        session.generate("How long?", chat=False, max_new_tokens=2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with kv.attach(model, memory, tokenizer) as session:
        with pytest.raises(TemplateNotCuttable, match="template is not the one"):
            session.generate("How long?")


def test_bos_is_added_once(tiny):
    model, tokenizer = tiny("llama")
    once = kv.capture(model, tokenizer, TEXT)
    spelled = kv.capture(model, tokenizer, tokenizer.bos_token + TEXT)
    assert once.tokens[0] == tokenizer.bos_token_id
    assert torch.equal(once.tokens, spelled.tokens)
    assert once.find("The refund").ranges[0][0] == 1


def test_scores_equal_a_full_forward(tiny):
    model, tokenizer = tiny("qwen3")
    memory = kv.capture(model, tokenizer, TEXT)
    scores = kv.score(model, tokenizer, memory, " How long", [" 60 days", " no", " 60"])
    plain = tokenizer(" How long", add_special_tokens=False)["input_ids"]
    for one in scores:
        ids = torch.tensor([[*memory.tokens.tolist(), *plain, *one.tokens]])
        with torch.no_grad():
            logits = model(ids).logits[0].float().log_softmax(-1)
        first = ids.shape[1] - len(one.tokens)
        expected = [logits[first + i - 1, t] for i, t in enumerate(one.tokens)]
        torch.testing.assert_close(one.logprobs, torch.stack(expected), atol=1e-4, rtol=0)
        assert tokenizer.decode(list(one.tokens)) == one.text
    assert scores[0].logprob == pytest.approx(float(scores[0].logprobs.sum()))


def test_limits_of_position_are_kept(tiny):
    model, tokenizer = tiny("gpt2")
    limit = model.config.n_positions
    with pytest.raises(ContextTooLong, match=str(limit)):
        kv.capture(model, None, torch.full((limit + 1,), 20))
    memory = kv.capture(model, None, torch.full((limit - 4,), 20))
    with kv.attach(model, memory) as session:
        with pytest.raises(ContextTooLong, match="at most"):
            session.generate([20, 21], max_new_tokens=20)
        session.generate([20, 21], max_new_tokens=3)
        with pytest.raises(ContextTooLong, match=str(limit)):
            session.forward(torch.full((1, 9), 20))


def test_estimate_is_of_the_right_order(tiny):
    model, tokenizer = tiny("llama")
    found = kv.estimate(model, tokenizer, TEXT * 4)
    memory = kv.capture(model, tokenizer, TEXT * 4)
    kv_bytes = sum(one.keys.nbytes + one.values.nbytes for one in memory.layers.values())
    assert found.bytes == kv_bytes and found.tokens == len(memory.tokens) and found.seconds > 0


def test_a_turn_that_is_refused_leaves_the_session_as_it_was(tiny):
    model, tokenizer = tiny("gpt2")
    limit = model.config.n_positions
    memory = kv.capture(model, None, torch.full((limit - 8,), 20))
    with kv.attach(model, memory, tokenizer) as session:
        with pytest.raises(ContextTooLong):
            session.generate([30, 31], max_new_tokens=50)
        with pytest.raises(UnsupportedModel):
            session.generate([30, 31], max_new_tokens=2, num_beams=2)

        def interrupt(text):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.generate([30, 31], max_new_tokens=4, stream=interrupt)
        assert len(session.source()) == limit - 8
        reply = session.generate([40, 41], max_new_tokens=3)
        grown = session.memory()
    assert grown.tokens[-5:].tolist() == [40, 41, *reply.tokens]
    with kv.attach(model, memory, tokenizer) as session:
        assert session.generate([40, 41], max_new_tokens=3) == reply


def test_tokens_of_forward_and_raw_calls_are_part_of_the_session(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    ids = tokenizer(" And then", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with kv.attach(model, memory, tokenizer) as session:
        session.forward(ids)
        assert session.source().text == TEXT + " And then"
        reply = session.generate(" so", max_new_tokens=3)
        spoken = session.source().text
        session.forward(ids)  # the reply's last token is read first
        assert session.source().text == spoken + " And then"
        start = int(session.cache.next_positions[0])
        at = torch.arange(start, start + ids.shape[1])[None]
        with torch.no_grad():
            model(ids, **{cache_argument(model): session.cache}, position_ids=at)
        grown = session.memory()
    assert grown.source.text == spoken + " And then And then"
    again = kv.capture(model, None, grown.tokens)
    torch.testing.assert_close(again.layers[2].keys, grown.layers[2].keys, atol=2e-5, rtol=0)
    assert torch.equal(grown.layers[0].source, torch.arange(len(grown.tokens)))
    assert len(reply.tokens) == 3


def test_embeddings_make_slots_without_tokens(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    ids = _ids(3)
    start = memory.next_position
    with kv.attach(model, memory, tokenizer) as session, torch.no_grad():
        model(
            inputs_embeds=model.get_input_embeddings()(ids),
            **{cache_argument(model): session.cache},
            position_ids=torch.arange(start, start + 3)[None],
        )
        session.forward(ids)
        grown = session.memory()
    assert grown.layers[0].source[-6:].tolist() == [-1, -1, -1, start, start + 1, start + 2]
    assert len(grown.tokens) == len(memory.tokens) + 3
