"""The tools that judge our answers and score our exports really read them: lm-eval, alpaca_eval and FastChat, each in
an environment of its own below .cache/tools: pytest -m slow tests/evaluate/test_other_tools.py"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ochat.commands.answer import AnswerOptions, main
from ochat.model import hf
from ochat.text.conversation import Conversation, Message
from ochat.text.template import load as load_template
from ochat.text.tokenizer import load as load_tokenizer
from tests import tiny
from tests.chat_stub import ChatStub
from tests.evaluate.conftest import read_lines
from tests.tiny import write_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TOOLS = tiny.ROOT / ".cache" / "tools"
# FastChat needs openai < 1, alpaca_eval a newer one
PACKAGES = {
    "open": ("torch==2.13.0", "lm-eval[hf]==0.4.13", "fschat==0.2.36", "openai<1", "anthropic"),
    "alpaca": ("alpaca_eval==0.6.6",),
}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LETTERS = "ABC"
# AGIEval's record, as published
EXAM = [
    {"passage": "Tom has two pens." if i % 2 else None, "question": f"What is {i}+1?", "label": LETTERS[i % 3]}
    | {"options": [f"({letter}){i + shift}" for shift, letter in enumerate(LETTERS)]}
    for i in range(8)
]
TASK = """
task: exam
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage or ''}}}}Q: {{{{question}}}} Answer Choices: {{{{options | join(' ')}}}}\\nThe answer is"
doc_to_choice: ["A", "B", "C"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def python(name: str) -> Path:
    """The interpreter of an environment with PACKAGES[name], made at the first call."""
    folder = TOOLS / name
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run([*pip, *PACKAGES[name]], capture_output=True, text=True)
        if made.returncode and re.search("connection|resolve|timed out", made.stderr, re.IGNORECASE):
            pytest.skip(f"the package registry cannot be reached: {made.stderr[-300:]}")
        assert made.returncode == 0, made.stderr[-3000:]
        (folder / ".ready").touch()
    return folder / "bin" / "python"


def run(name: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """The standard output of a program in an environment, without network."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= dict.fromkeys(OFFLINE, "1") | {"HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([python(name), *map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    print(done.stdout[-3000:])
    return done.stdout


def answer(model: Path, questions: Path, output: Path, **more: str) -> None:
    main(AnswerOptions(model=str(model), questions=questions, output=output, max_new_tokens=6, dtype="float32", **more))


def test_lm_eval_scores_an_export_as_we_do(exported, tmp_path):
    """Each choice's log-likelihood is ours, after the prompt that the template writes for the default class."""
    write_lines(tmp_path / "exam.jsonl", EXAM)
    (tmp_path / "exam.yaml").write_text(TASK.format(data=tmp_path / "exam.jsonl"))
    options = [f"--model_args=pretrained={exported},dtype=float32", "--apply_chat_template", "--include_path=."]
    options += ["--tasks=exam", "--device=cpu", "--output_path=out", "--log_samples"]
    run("open", "-m", "lm_eval", "run", "--model=hf", *options, cwd=tmp_path)
    (samples,) = (tmp_path / "out").rglob("samples_exam*.jsonl")
    (results,) = (tmp_path / "out").rglob("results*.json")
    ours, tokenizer = hf.load(exported, dtype="float32"), load_tokenizer(exported)
    template = load_template("openchat_v3.2")
    num_right = 0
    for line, record in zip(read_lines(samples), EXAM, strict=True):
        question = f"{record['passage'] or ''}Q: {record['question']} Answer Choices: {' '.join(record['options'])}"
        asked = Conversation((Message("user", f"{question}\nThe answer is"),), "GPT4")
        prompt = template.encode_prompt(asked, tokenizer)
        (logits,) = ours.logits([prompt])
        wanted = torch.log_softmax(logits[-1], 0)[[tokenizer.encode(letter)[-1] for letter in LETTERS]]
        found = [float(response[0]) for response in line["filtered_resps"]]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)
        num_right += LETTERS[int(wanted.argmax())] == record["label"]
    assert json.loads(results.read_text())["results"]["exam"]["acc,none"] == num_right / len(EXAM)


def test_alpaca_eval_judges_our_file_against_another(exported, tmp_path):
    """Its GPT-4 annotator, answered by a stub that prefers our outputs wherever they are shown."""
    instructions = [f"{i}+1" for i in range(4)]
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": each, "dataset": "x"} for each in instructions]))
    answer(exported, tmp_path / "alpaca.json", tmp_path / "mine.json")
    theirs = [{"instruction": each, "output": "THEIRS", "generator": "other"} for each in instructions]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))

    def rank(body) -> str:
        first = body["messages"][-1]["content"].split('"model_2"')[0]
        best = 2 if "THEIRS" in first else 1
        return str([{"model": f"model_{best}", "rank": 1}, {"model": f"model_{3 - best}", "rank": 2}])

    program = """if True:
        from alpaca_eval import evaluate
        board, _ = evaluate("mine.json", "theirs.json", "alpaca_eval_gpt4", precomputed_leaderboard=None,
                            is_return_instead_of_print=True, output_path="out", caching_path=None,
                            fn_metric="get_winrate", sort_by="win_rate")  # length control fits on data from a hub
        print(board.to_csv())
    """
    with ChatStub(rank) as stub:
        shown = run("alpaca", "-c", program, cwd=tmp_path, OPENAI_BASE_URL=stub.endpoint, OPENAI_API_KEY="none")
        assert len(stub.requests) == len(instructions)
    board = dict(zip(*(line.split(",") for line in shown.strip().splitlines()[-2:]), strict=True))
    assert board[""] == "mine" and board["win_rate"] == "100.0" and board["n_total"] == "4"


def test_fastchat_reads_our_answers_and_makes_its_matches(exported, tmp_path):
    lines = [{"question_id": i, "category": "math", "turns": [f"{i}+{i}", "1+1"]} for i in (81, 82)]
    file = write_lines(tmp_path / "question.jsonl", lines)
    for condition in ("GPT4", "GPT3"):
        more = {"format": "mt_bench", "condition": condition}
        answer(exported, file, tmp_path / "model_answer" / f"{condition}.jsonl", **more)
    program = """if True:
        import json
        from fastchat.llm_judge import gen_judgment as judgment
        from fastchat.llm_judge.common import check_data, load_model_answers, load_questions
        questions = load_questions("question.jsonl", None, None)
        answers = load_model_answers("model_answer")
        models = sorted(answers)
        judges = {"math": judgment.Judge("gpt-4", {"type": "single"}, ref_based=False, multi_turn=True)}
        check_data(questions, answers, {}, models, judges)
        pairs = judgment.make_match_all_pairs(questions, models, answers, judges["math"], multi_turn=True)
        turns = {name: [answers[name][q["question_id"]]["choices"][0]["turns"] for q in questions] for name in models}
        print(json.dumps({"models": models, "matches": len(pairs), "turns": turns}))
    """
    found = json.loads(run("open", "-c", program, cwd=tmp_path).strip().splitlines()[-1])
    assert found["models"] == ["GPT3", "GPT4"] and found["matches"] == 2
    for name, turns in found["turns"].items():
        written = read_lines(tmp_path / "model_answer" / f"{name}.jsonl")
        assert turns == [line["choices"][0]["turns"] for line in written]
