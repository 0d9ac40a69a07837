"""Corpus, chunks, seed prompts: what is read and what is asked."""

import json
import random

import pytest

from kvedit.cartridges.study import (
    FORMATS,
    KINDS,
    Chunker,
    Chunking,
    Corpus,
    Document,
    SeedPrompt,
    StudySettings,
)
from kvedit.cartridges.study.seeds import draw_prompt
from kvedit.errors import ContextTooLong, InvalidArgument, UnknownName
from kvedit.models.tiny_tokenizer import tiny_tokenizer

TEXT = (
    "One lamp is red. Another is blue! Is a third one green? "
    + "x" * 90
    + " Äöü, 明治維新。\n\nEnd."
)


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents = {"documents": ["third", {"title": "named", "text": "fourth"}]}
    (tmp_path / "c.json").write_text(json.dumps(documents))
    found = [(document.title, document.text) for document in Corpus.read(tmp_path)]
    assert found == [
        ("a.txt", "first"), ("b/two.md", "second"), ("c.json, 1", "third"), ("named", "fourth")
    ]  # fmt: skip


def test_digests_tell_texts_titles_and_order_apart():
    a, b = Document("a", "x"), Document("b", "x")
    digests = {Corpus.of(*parts).digest for parts in [(a,), (b,), (a, b), (b, a)]}
    assert len(digests) == 4
    assert Corpus.of(Document("a", "x")).digest == Corpus.of(a).digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00bad", "can't be read as UTF-8"),
        ("a.txt", b"  \n", "has no text"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"[]", "expected a list of documents"),
        ("a.json", b'{"title": "x"}', "expected a list of documents"),
        ("a.json", b'[{"title": "x"}]', "document 1: expected a text"),
        ("a.json", b'["\\ud800"]', "no valid Unicode"),
        ("a.json", b'[{"title": "t", "text": "x"}, {"title": "t", "text": "y"}]', "must differ"),
        ("a.pdf", b"%PDF", "expected a folder or a file"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        Corpus.read(path)


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="corpus is empty"):
        Corpus.of()
    with pytest.raises(InvalidArgument, match="holds no"):
        Corpus.read(tmp_path)
    with pytest.raises(InvalidArgument, match=r"absent\.txt can't be read"):
        Corpus.read(tmp_path / "absent.txt")


@pytest.mark.parametrize("bounds", [(1, 7), (3, 12), (12, 12), (30, 400)])
def test_covering_chunks_are_the_whole_text_within_bounds(bounds):
    tokenizer = tiny_tokenizer()
    corpus = Corpus.of(TEXT, "Short. " * 9, "Tiny.")
    chunker = Chunker(tokenizer, corpus, Chunking("cover", *bounds))
    for document in corpus:
        chunks = [chunk for chunk in chunker.cover if chunk.title == document.title]
        assert "".join(chunk.text for chunk in chunks) == document.text
        for chunk in chunks:
            assert document.text[chunk.start : chunk.stop] == chunk.text
            # A cut inside a character's bytes or a merge can cost a token or two.
            assert len(tokenizer(chunk.text, add_special_tokens=False).input_ids) <= bounds[1] + 3


def test_covering_chunks_end_with_sentences_and_none_is_left_short():
    tokenizer = tiny_tokenizer()
    corpus = Corpus.of("The lamp is red now. " * 11)
    chunker = Chunker(tokenizer, corpus, Chunking("cover", 20, 33))
    texts = [chunk.text for chunk in chunker.cover]
    assert len(texts) > 2
    assert all(text.startswith("The lamp") and text.endswith("now. ") for text in texts)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    # The space that a next sentence's first token took along stands alone at the end: one more.
    assert min(lengths) >= 20 and max(lengths) <= 34


def test_each_turn_over_a_cover_reads_every_chunk_once_in_a_new_order():
    chunker = Chunker(
        tiny_tokenizer(), Corpus.of("The lamp is red. " * 40), Chunking("cover", 4, 9)
    )
    size = len(chunker.cover)
    turns = [[chunker.visit(turn * size + i).key for i in range(size)] for turn in range(2)]
    assert sorted(turns[0]) == sorted(turns[1]) == sorted(chunk.key for chunk in chunker.cover)
    assert turns[0] != turns[1]


def test_random_spans_are_drawn_from_the_seed_alone():
    tokenizer = tiny_tokenizer()
    corpus = Corpus.of(TEXT * 3, "A short one.")
    options = Chunking("random", 10, 30)
    chunks = [Chunker(tokenizer, corpus, options, 3).visit(i) for i in range(60)]
    again = Chunker(tokenizer, corpus, options, 3)
    assert [again.visit(i) for i in reversed(range(60))] == chunks[::-1]
    assert [Chunker(tokenizer, corpus, options, 4).visit(i) for i in range(60)] != chunks
    long = [chunk for chunk in chunks if chunk.title == "document 1"]
    assert {chunk.text for chunk in chunks if chunk.title != "document 1"} <= {"A short one."}
    assert len(long) > 40 and len({chunk.start for chunk in long}) > 20
    lengths = [len(tokenizer(c.text, add_special_tokens=False).input_ids) for c in long]
    assert 8 <= min(lengths) < 15 and 25 < max(lengths) <= 33


def test_a_chunk_beyond_the_context_is_refused_or_clipped():
    assert Chunking(max_tokens=1024).fitted(2000) == Chunking(max_tokens=1024)
    with pytest.raises(ContextTooLong, match="100 tokens are left"):
        Chunking().fitted(100)
    clipped = Chunking(overlong="clip").fitted(100)
    assert (clipped.min_tokens, clipped.max_tokens) == (100, 100)
    with pytest.raises(ContextTooLong, match="0 tokens are left"):
        Chunking(overlong="clip").fitted(-5)


@pytest.mark.parametrize("options", [{"mode": "all"}, {"min_tokens": 0}, {"max_tokens": 2}])
def test_bad_chunking_is_refused(options):
    with pytest.raises(InvalidArgument, match=r"expected|must be"):
        Chunking(**options)


def test_every_kind_and_format_comes_up():
    drawn = random.Random(0)
    own = SeedPrompt("legal", "Ask about a clause.")
    prompts = [draw_prompt(tuple(KINDS), (own,), drawn) for _ in range(600)]
    assert {prompt.kind for prompt in prompts} == {*KINDS, "legal"}
    asked = " ".join(prompt.text for prompt in prompts if prompt.kind == "structuring")
    assert all(name in asked for name in FORMATS)
    assert not any("{" in prompt.text for prompt in prompts)


def test_own_prompts_may_join_a_kind_or_stand_alone():
    own = SeedPrompt("question", "Ask in {format}.")
    prompts = [draw_prompt(("question",), (own,), random.Random(i)).text for i in range(80)]
    assert {text.split()[0] for text in prompts} == {"Write", "Ask"}
    assert draw_prompt((), (own,), random.Random(0)).text.startswith("Ask in ")
    with pytest.raises(UnknownName, match="Did you mean question"):
        StudySettings(kinds=("questions",))
    with pytest.raises(InvalidArgument, match="at least one kind"):
        StudySettings(kinds=())


@pytest.mark.parametrize(
    "options",
    [{"per_chunk": 0}, {"top_k": 0}, {"min_mass": 0.0}, {"intro": "no place"}, {"plain": "none"}],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(InvalidArgument, match="found"):
        StudySettings(**options)
