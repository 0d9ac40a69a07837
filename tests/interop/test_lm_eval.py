"""lm-evaluation-harness itself over our memory: its tasks, its models; skipped without it."""

import pytest
import torch

import kvedit as kv
from kvedit.interop import evaluated, to_lm_eval
from kvedit.interop.lm_eval import model_class
from kvedit.models.tiny import tiny_model
from tests.interop.steering_cases import hooked, random_delta, run_the_card

lm_eval = pytest.importorskip("lm_eval", reason="needs kvedit[lm-eval]")
pytest.importorskip("datasets")

TEXT = "The thing in the box is the answer. The refund window is 60 days."
QUESTIONS = ["What is in the box", "How long would you wait", "Is that all", "What is it"]
CHOICES = ["the answer", "60 days", "that is all"]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def task(kind):
    """A toy task of ours: multiple choice, a whole text, or a reply."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    docs = [{"text": one, "label": n % 3} for n, one in enumerate(QUESTIONS)]
    config = {
        "task": f"toy_{kind}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": kind,
        "num_fewshot": 0,
    }
    if kind == "multiple_choice":
        config |= {
            "doc_to_text": " {{text}}?",
            "doc_to_target": "{{label}}",
            "doc_to_choice": CHOICES,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    elif kind == "generate_until":
        config |= {
            "doc_to_text": " {{text}}?",
            "doc_to_target": "60",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "bypass"}],
        }
    else:
        config |= {
            "doc_to_text": "",
            "doc_to_target": " {{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        }
    return ConfigurableTask(config=config)


def run(model, *kinds):
    """Every document's raw answers, and the results, by task."""
    from lm_eval.tasks import TaskManager

    # Without the index of its own tasks, which takes half a minute to make.
    manager = TaskManager(include_defaults=False)
    done = lm_eval.simple_evaluate(
        model=model,
        tasks=[task(kind) for kind in kinds],
        bootstrap_iters=0,
        task_manager=manager,
    )
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for name, samples in done["samples"].items()
    }
    return answers, done["results"]


def flat(answers):
    """All answers, in order; what was scored comes as text in some releases."""
    if isinstance(answers, list | tuple) and not isinstance(answers, str):
        return [one for each in answers for one in flat(each)]
    return [answers]


def test_the_model_alone_is_the_harness_own(llama):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = llama
    kinds = ("multiple_choice", "generate_until")
    theirs, wanted = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), *kinds)
    ours, found = run(evaluated(model, tokenizer, batch=3), *kinds)
    for name in theirs:
        for one, two in zip(flat(ours[name]), flat(theirs[name]), strict=True):
            assert one == (pytest.approx(two, abs=1e-3) if isinstance(two, float) else two)
    assert found["toy_multiple_choice"]["acc,none"] == wanted["toy_multiple_choice"]["acc,none"]


def test_tasks_run_behind_an_edited_memory(llama):
    model, tokenizer = llama
    memory = kv.capture(model, tokenizer, TEXT)
    edited = kv.editors.Suppress(span="60 days", strength=float("inf"))(memory)
    kinds = ("multiple_choice", "generate_until", "loglikelihood_rolling")
    seen = {}
    for name, one in (("whole", memory), ("edited", edited)):
        seen[name], results = run(evaluated(model, tokenizer, one), *kinds)
        assert set(results) == {f"toy_{kind}" for kind in kinds}
        scores = iter(flat(seen[name]["toy_multiple_choice"]))
        for text in QUESTIONS:
            for score in kv.score(
                model, tokenizer, one, f" {text}?", [f" {choice}" for choice in CHOICES]
            ):
                assert next(scores) == pytest.approx(score.logprob, abs=1e-3)
                assert isinstance(next(scores), bool)
        for text, reply in zip(QUESTIONS, flat(seen[name]["toy_generate_until"]), strict=True):
            said = kv.generate(model, tokenizer, one, f" {text}?", max_new_tokens=6, stop=["e"])
            assert reply == said
    assert seen["whole"] != seen["edited"]


def test_their_steered_model_reads_what_the_card_makes(llama, tmp_path):
    from lm_eval.models.hf_steered import SteeredModel

    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    delta = random_delta(model, tokenizer)
    to_lm_eval(delta, tmp_path / "calm", model, tokenizer, strength=0.7)
    made = run_the_card(tmp_path / "calm")
    theirs, _ = run(
        SteeredModel(str(tmp_path / "model"), str(made), device="cpu"),
        "multiple_choice",
        "generate_until",
    )
    vectors = delta.vectors["residual"].items()
    from kvedit.interop import Answers

    around = lambda: hooked([(model.model.layers[i], 0.7 * v) for i, v in vectors])  # noqa: E731
    ours, _ = run(
        model_class()(Answers(model, tokenizer, around=around)), "multiple_choice", "generate_until"
    )
    for name in theirs:
        for one, two in zip(flat(ours[name]), flat(theirs[name]), strict=True):
            assert one == (pytest.approx(two, abs=1e-3) if isinstance(two, float) else two)
    plain, _ = run(evaluated(model, tokenizer), "multiple_choice")
    assert flat(plain["toy_multiple_choice"]) != flat(theirs["toy_multiple_choice"])


@pytest.mark.parametrize("behind", [True, False])
def test_tasks_run_while_the_model_is_steered(llama, behind):
    """Steering at every position: the same as plain hooks, memory or none."""
    from kvedit.interop import Answers

    model, tokenizer = llama
    memory = kv.capture(model, tokenizer, TEXT) if behind else None
    delta = random_delta(model, tokenizer)
    kinds = ("multiple_choice", "generate_until", "loglikelihood_rolling")
    ours, _ = run(evaluated(model, tokenizer, memory, delta=delta, strength=0.7), *kinds)
    vectors = delta.vectors["residual"].items()
    around = lambda: hooked([(model.model.layers[i], 0.7 * v) for i, v in vectors])  # noqa: E731
    wanted, _ = run(model_class()(Answers(model, tokenizer, memory, around=around)), *kinds)
    for name in wanted:
        for one, two in zip(flat(ours[name]), flat(wanted[name]), strict=True):
            assert one == (pytest.approx(two, abs=1e-3) if isinstance(two, float) else two)


def test_chats_are_rendered_by_the_tokenizer(llama):
    model, tokenizer = llama
    lm = evaluated(model, tokenizer)
    chat = [{"role": "user", "content": "How long?"}]
    assert lm.apply_chat_template(chat) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert lm.chat_template(True) == tokenizer.chat_template
    assert lm.chat_template(False) is None
    assert "/" not in lm.tokenizer_name
    assert torch.is_tensor(model.lm_head.weight)
