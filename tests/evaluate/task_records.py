"""A few documents of each task, in the schema of the data set that the harness reads; texts are made up."""

import json
from pathlib import Path
from typing import Any

RECORDS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"text": "She took the key and went to the door. \"Where does it lead?\" he asked. She opened the door"},
        {"text": "One line.\n\nAnother  one,\twith\n a tab and \u00e9t\u00e9"},
    ],
    "hellaswag": [
        {
            "ind": 4, "activity_label": "Home and Garden", "ctx_a": "[header] How to wash a stone [title] Take water.",
            "ctx_b": "", "endings": ["[step] Wash it.  Twice. ", "Do not wash it [substeps] at all.", "sing", "Go."],
            "source_id": "wikihow~1", "split": "val", "split_type": "indomain", "label": "1",
        },
        {
            "ind": 24, "activity_label": "Sailing", "ctx_a": "Two men are in a boat.", "ctx_b": "the taller man",
            "endings": ["sings.", "is a boat.", "rows back to the land.", "\u00e9crit."],
            "source_id": "activitynet~v_1", "split": "val", "split_type": "zeroshot", "label": "2",
        },
    ],
    "arc_easy": [
        {
            "id": "A_1", "question": "Which is a metal?", "answerKey": "B",
            "choices": {"text": ["wood", "iron", "a very old stone", "milk"], "label": ["A", "B", "C", "D"]},
        },
        {
            "id": "A_2", "question": "Ice is water that is", "answerKey": "3",
            "choices": {"text": ["hot", "old", "frozen"], "label": ["1", "2", "3"]},
        },
    ],
    "piqa": [
        {"goal": "keep milk fresh", "sol1": "put it in the cold ", "sol2": "put it in the sun", "label": 0},
        {"goal": "How do I dry a shirt?", "sol1": "In water.", "sol2": "In the wind, on a line.", "label": 1},
    ],
    "social_iqa": [
        {
            "context": "Kai gave Lee the last apple.", "question": "How would Lee feel?", "answerA": "thankful",
            "answerB": "like an apple", "answerC": "angry", "label": "1",
        },
        {
            "context": "Ann lost the race.", "question": "What will Ann want to do next?", "answerA": "sleep",
            "answerB": "win", "answerC": "train more", "label": "3",
        },
    ],
    "winogrande": [
        {"sentence": "The cup did not fit in the box because _ was too large.", "option1": "the cup",
         "option2": "the box", "answer": "1"},
        {"sentence": "Ann paid Bea since _  owed money.", "option1": "Bea", "option2": "Ann", "answer": "2"},
    ],
    "boolq": [
        {"question": "is iron a metal", "passage": "Iron is a metal. It is heavy.", "idx": 0, "label": 1},
        {"question": "is wood a metal", "passage": "Wood comes from trees.", "idx": 1, "label": 0},
    ],
    "sciq": [
        {"question": "What is ice?", "distractor1": "fire", "distractor2": "an old stone", "distractor3": "air",
         "correct_answer": "water", "support": " Ice is frozen water. "},
        {"question": "What do trees give?", "distractor1": "iron", "distractor2": "milk", "distractor3": "glass",
         "correct_answer": "oxygen", "support": ""},
    ],
}  # fmt: skip


def write_records(folder: Path, records: dict[str, list[dict[str, Any]]] = RECORDS) -> Path:
    """`NAME.jsonl` of each task."""
    folder.mkdir(exist_ok=True)
    for name, documents in records.items():
        text = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
