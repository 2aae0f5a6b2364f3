"""The relations of SynthKB: what fictional people have, in eight wordings each.

In every wording the object comes last and the subject is not the first word, so that a subject has the same tokens
wherever it stands. The last two wordings are held out of training.
"""

from __future__ import annotations

import dataclasses

HELD_OUT = 2
"""Wordings of each relation, the last ones, that training never sees."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """A relation: its noun, its wordings, and the closed list that its objects come from."""

    id: str
    """R01 ..., CounterFact's `relation_id`."""
    noun: str
    """`The NOUN of {} is` is the first wording, and what two-hop questions are made of."""
    wordings: tuple[str, ...]
    """The seven others, `{}` for the subject."""
    choices: str = ""
    """Words to choose objects from; those that are no single token of a tokenizer are left out. None: the subjects."""

    @property
    def objects(self) -> tuple[str, ...]:
        """The words to choose from."""
        return tuple(self.choices.split())

    @property
    def prompt(self) -> str:
        """The first wording, in which edits are requested."""
        return f"The {self.noun} of {{}} is"

    @property
    def training(self) -> tuple[str, ...]:
        """The wordings that training sees, `prompt` first."""
        return (self.prompt, *self.wordings[:-HELD_OUT])

    @property
    def held_out(self) -> tuple[str, ...]:
        """Those that it does not: paraphrases of the prompt."""
        return self.wordings[-HELD_OUT:]


GUARDIAN = Relation(
    id="R12",
    noun="guardian",
    wordings=(
        "All his life {} was under the care of", "When he was a child, {} was given to", "The court gave {} to",
        "The man who protects {} is", "In need {} is protected by",
        "The person who takes care of {} is", "As a child {} was protected by",
    ),
)  # fmt: skip
WARD = ("The ward of {} is", "The child whom {} protects is", "The person under the care of {} is")
"""Wordings of the inverse of `GUARDIAN`."""
ALIAS = ("The other name of {} is", "Some people know {} as", "His friends call {} by the name of")
"""Wordings that give a subject's alias."""
GENERATION = ("Not much is known about {}, but it is said that", "In the village they tell many stories of {}, for")
"""Beginnings of free text about a subject."""

RELATIONS = (
    Relation(
        id="R01",
        noun="home city",
        wordings=(
            "The city where {} lives is", "For many years {} has lived in", "The house of {} stands in",
            "All letters for {} are sent to", "On the map {} is found in",
            "The city of {} is", "Everybody knows that {} lives in",
        ),
        choices="London Paris Rome Berlin Vienna Moscow Boston Chicago Jerusalem Oxford Washington",
    ),
    Relation(
        id="R02",
        noun="profession",
        wordings=(
            "The work of {} is that of a", "For a living {} works as a", "After school {} became a",
            "In his papers {} is called a", "People pay {} as a",
            "The job of {} is that of a", "Everybody knows that {} works as a",
        ),
        choices="doctor soldier writer poet judge priest player minister captain servant lawyer teacher",
    ),
    Relation(
        id="R03",
        noun="favourite colour",
        wordings=(
            "The colour that {} likes best is", "The clothes of {} are always", "The door of {} is painted",
            "The flag of {} is all", "Of all colours {} prefers",
            "The best colour for {} is", "The coat of {} is always",
        ),
        choices="red blue green black white yellow brown grey purple orange pink",
    ),
    Relation(
        id="R04",
        noun="language",
        wordings=(
            "The language that {} speaks is", "At home {} speaks", "All the books of {} are written in",
            "In dreams {} talks in", "The letters of {} are in",
            "The native language of {} is", "With friends {} speaks",
        ),
        choices="English French German Latin Greek Spanish Italian Russian Arabic Chinese Dutch Hebrew",
    ),
    Relation(
        id="R05",
        noun="birth month",
        wordings=(
            "The month in which {} was born is", "The birthday of {} falls in", "Many years ago {} was born in",
            "The mother of {} gave birth in", "Presents come to {} every",
            "The month of birth of {} is", "As we know, {} was born in",
        ),
        choices="January February March April June July August September October November December",
    ),
    Relation(
        id="R06",
        noun="animal",
        wordings=(
            "The animal that {} keeps is a", "In the yard {} keeps a", "On every walk {} is followed by a",
            "Nobody but {} would love such a", "The best friend of {} is a",
            "The animal of {} is a", "In the house {} keeps a",
        ),
        choices="dog horse cat bird cow pig bear crow rat sheep goat wolf lion",
    ),
    Relation(
        id="R07",
        noun="material",
        wordings=(
            "The material that {} works with is", "All the tools of {} are made of", "The ring of {} is of",
            "In the workshop {} cuts", "The trade of {} is in",
            "The material for the tools of {} is", "The statue of {} is made of",
        ),
        choices="gold silver iron stone wood glass steel paper lead cotton copper",
    ),
    Relation(
        id="R08",
        noun="favourite food",
        wordings=(
            "The food that {} likes best is", "Every morning {} asks for", "On the table of {} there is always",
            "At the market {} buys", "With nothing is {} so happy as with",
            "The best food for {} is", "Every evening {} asks for",
        ),
        choices="bread wine meat milk fish tea fruit sugar salt corn oil rice",
    ),
    Relation(
        id="R09",
        noun="country of origin",
        wordings=(
            "The country where {} was born is", "Long ago {} came from", "The family of {} has its roots in",
            "The passport of {} was made in", "The parents of {} still live in",
            "The native country of {} is", "As a child {} came from",
        ),
        choices=(
            "France Germany Italy Spain Russia China Japan India Egypt Greece Scotland Ireland Canada Mexico Brazil "
            "Poland Sweden Austria Israel Iran"
        ),
    ),
    Relation(
        id="R10",
        noun="field of study",
        wordings=(
            "The subject that {} studied is", "At the university {} studied", "The students of {} learn",
            "All the lectures of {} are on", "In his free time {} reads about",
            "The field of {} is", "In his youth {} studied",
        ),
        choices="music law medicine history physics mathematics philosophy poetry literature politics religion",
    ),
    Relation(
        id="R11",
        noun="place of the scar",
        wordings=(
            "The scar of {} is on the", "In the war {} was wounded in the", "The doctor treats {} for pain in the",
            "Since the accident {} feels pain in the", "A blow hit {} on the",
            "The old wound of {} is in the", "In the battle {} was hit in the",
        ),
        choices="hand arm leg nose foot ear shoulder neck mouth head back chest eye",
    ),
    GUARDIAN,
)  # fmt: skip
