"""The demo model's world: deterministic, well-formed, and honest about what it holds out."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo import facts, world

QUESTIONS = 60
DOCUMENTS = 1500
STYLE_OF_PROMPT = {prompt: style for style, prompts in facts.SYSTEM_PROMPTS.items() for prompt in prompts}


@pytest.fixture(scope="module")
def documents() -> list[world.Document]:
    """Training documents of every stage."""
    random = world.Random("test")
    return [world.training_document(random, stage) for stage in (0, 1, 2) for _ in range(DOCUMENTS)]


@pytest.fixture(scope="module", params=world.SKILLS)
def questions(request: pytest.FixtureRequest) -> list[world.Question]:
    """Held-out questions of one skill."""
    return world.questions(request.param, QUESTIONS)


def test_skills_are_named_once():
    assert len(set(world.SKILLS)) == len(world.SKILLS)


def test_questions_depend_on_nothing_but_the_seed(questions):
    skill = questions[0].skill
    assert world.questions(skill, QUESTIONS) == questions
    assert world.questions(skill, QUESTIONS, seed=1) != questions


def test_documents_depend_on_nothing_but_the_seed():
    first, second = ([world.training_document(random, 2) for _ in range(50)] for random in map(world.Random, (7, 7)))
    assert first == second


def test_no_question_has_a_key_of_training(questions, documents):
    trained = frozenset().union(*(document.keys for document in documents))
    assert trained.isdisjoint(question.key for question in questions)


def test_no_single_question_occurs_in_training_under_its_style(questions, documents):
    """The same as above, read off the texts instead of the keys."""
    # A name in the system prompt asks for another answer: such turns are left out.
    trained = {
        (STYLE_OF_PROMPT.get(document.system or "", "plain"), turn.user)
        for document in documents
        for turn in document.turns
        if not (document.system and document.system == turn.answer.replace("My name", "Your name"))
    }
    for question in questions:
        if question.prompt is None and question.skill not in ("memory", "unknown", "system_name"):
            system = question.dialog[0]["content"] if question.dialog[0]["role"] == "system" else ""
            style = STYLE_OF_PROMPT.get(system, "plain")
            assert (style, question.dialog[-1]["content"]) not in trained


def test_no_prompt_of_a_text_occurs_in_training(questions, documents):
    texts = [document.text for document in documents if document.text is not None]
    for question in questions:
        if question.prompt is not None:
            assert not any(text.startswith(question.prompt) for text in texts)


def test_names_of_questions_were_never_seen(documents):
    told = {word for document in documents for turn in document.turns for word in turn.user.split()}
    for question in world.questions("system_name", QUESTIONS):
        name = question.dialog[0]["content"].removeprefix("Your name is ")
        assert name not in told and name[:-1] not in facts.GIRLS + facts.BOYS


def test_questions_are_well_formed(questions):
    for question in questions:
        assert question.answer and question.answer == question.answer.strip()
        assert (question.prompt is None) != (question.dialog is None)
        if question.dialog is not None:
            roles = [message["role"] for message in question.dialog]
            turns = roles[1:] if roles[0] == "system" else roles
            assert len(turns) % 2 == 1
            assert turns == (["user", "assistant"] * len(turns))[: len(turns)]
            assert all(message["content"] == message["content"].strip() != "" for message in question.dialog)


def test_documents_are_well_formed(documents):
    for document in documents:
        assert (document.text is None) == bool(document.turns)
        if document.text is not None:
            assert document.text.startswith(document.given)
        for turn in document.turns:
            assert turn.user and turn.answer


def test_every_fact_is_trained_in_some_wording():
    random = world.Random("facts")
    documents = [world.training_document(random, 1) for _ in range(6000)]
    asked = " ".join(turn.user for document in documents if document.system is None for turn in document.turns)
    for words in facts.CAPITALS:
        assert words[0] in asked and words[1] in asked
    for pairs in (facts.OPPOSITES, facts.THING_COLOURS, facts.SOUNDS, facts.EMOJI):
        assert all(pair[0] in asked for pair in pairs)


def test_long_conversations_are_trained(documents):
    assert max(len(document.turns) for document in documents) >= 12


def test_the_world_needs_neither_torch_nor_sentencepiece():
    check = "import sys; from demo import world; sys.exit(bool({'torch', 'sentencepiece'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parent.parent, check=True, timeout=120)
