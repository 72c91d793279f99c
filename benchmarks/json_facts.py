"""Plain facts, asked for in JSON: the task of :mod:`benchmarks.json_answers`.

A question has one line of JSON for an answer::

    What is the capital of France?
    {"kind": "city", "answer": "Paris"}

Facts are split by a shuffle: those that are trained on, those on which a rule and its parameter are
chosen, and those of the test. The wanted shape is learned from :func:`documents`, whose values are
made up: nothing in them is a fact.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tta_ext.evaluation import Score, Task

# kind: question, then thing=answer; of several answers each is right.
FACTS = """\
city: What is the capital of {}?
France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Greece=Athens;
Austria=Vienna; Hungary=Budapest; Poland=Warsaw; Sweden=Stockholm; Norway=Oslo; Finland=Helsinki;
Denmark=Copenhagen; Iceland=Reykjavik; Ireland=Dublin; Belgium=Brussels; Russia=Moscow;
Ukraine=Kyiv/Kiev; Romania=Bucharest; Bulgaria=Sofia; Turkey=Ankara; Egypt=Cairo; Morocco=Rabat;
Kenya=Nairobi; Ethiopia=Addis Ababa; Nigeria=Abuja; Ghana=Accra; Senegal=Dakar; Japan=Tokyo;
China=Beijing; India=New Delhi/Delhi; Thailand=Bangkok; Vietnam=Hanoi; Indonesia=Jakarta;
Nepal=Kathmandu; Pakistan=Islamabad; Iran=Tehran; Iraq=Baghdad; Syria=Damascus; Lebanon=Beirut;
Jordan=Amman; Afghanistan=Kabul; Canada=Ottawa; Mexico=Mexico City; Cuba=Havana; Peru=Lima;
Chile=Santiago; Argentina=Buenos Aires; Colombia=Bogotá/Bogota; Venezuela=Caracas; Ecuador=Quito;
Brazil=Brasília/Brasilia; Australia=Canberra; New Zealand=Wellington; Serbia=Belgrade;
Croatia=Zagreb; Czech Republic=Prague; Latvia=Riga; Estonia=Tallinn; Lithuania=Vilnius;
Cambodia=Phnom Penh; Laos=Vientiane; Bangladesh=Dhaka; Sri Lanka=Colombo; Mongolia=Ulaanbaatar;
South Korea=Seoul; North Korea=Pyongyang; Libya=Tripoli; Tunisia=Tunis; Algeria=Algiers;
Sudan=Khartoum; Uganda=Kampala; Zimbabwe=Harare; Somalia=Mogadishu; Jamaica=Kingston

country: In which country is {}?
Munich=Germany; Milan=Italy; Barcelona=Spain; Porto=Portugal; Lyon=France; Kraków=Poland;
Gothenburg=Sweden; Bergen=Norway; Osaka=Japan; Shanghai=China; Mumbai=India; Karachi=Pakistan;
Istanbul=Turkey; Alexandria=Egypt; Casablanca=Morocco; Mombasa=Kenya; Lagos=Nigeria;
Cape Town=South Africa; Toronto=Canada; Guadalajara=Mexico; Cusco=Peru; Rio de Janeiro=Brazil;
Sydney=Australia; Auckland=New Zealand; Salzburg=Austria; Geneva=Switzerland; Antwerp=Belgium;
Rotterdam=Netherlands; Saint Petersburg=Russia; Mecca=Saudi Arabia; Dubai=United Arab Emirates;
Manchester=England/United Kingdom; Chicago=United States; the Eiffel Tower=France;
the Taj Mahal=India; the Colosseum=Italy; Machu Picchu=Peru; the Great Sphinx=Egypt;
Mount Fuji=Japan; the Acropolis=Greece; Stonehenge=England/United Kingdom; the Kremlin=Russia;
Chichen Itza=Mexico; Angkor Wat=Cambodia; Petra=Jordan; Hiroshima=Japan; Naples=Italy;
Marseille=France; Hamburg=Germany; Seville=Spain; Busan=South Korea; Medellín=Colombia;
Edinburgh=Scotland/United Kingdom; Zurich=Switzerland; Timbuktu=Mali

opposite: What is the opposite of "{}"?
hot=cold; big=small/little; up=down; left=right; good=bad/evil; happy=sad/unhappy;
open=closed/close; light=dark/heavy; fast=slow; young=old; rich=poor; strong=weak; early=late;
high=low; wet=dry; hard=soft/easy; full=empty; clean=dirty; loud=quiet/silent; thick=thin;
day=night; love=hate; war=peace; life=death; front=back; top=bottom; begin=end; win=lose;
buy=sell; give=take/receive; push=pull; arrive=depart/leave; remember=forget; laugh=cry;
true=false; possible=impossible; always=never; inside=outside; before=after; near=far;
deep=shallow; wide=narrow; sharp=dull/blunt; sweet=sour/bitter; rough=smooth;
brave=cowardly/afraid; safe=dangerous/unsafe; success=failure; friend=enemy/foe; question=answer;
first=last; north=south; east=west; summer=winter; black=white; ancient=modern;
accept=reject/refuse; victory=defeat; increase=decrease; expand=contract/shrink; import=export;
public=private

past: What is the past tense of "{}"?
go=went; eat=ate; drink=drank; sing=sang; swim=swam; run=ran; see=saw; come=came; give=gave;
take=took; make=made; write=wrote; drive=drove; ride=rode; speak=spoke; break=broke; choose=chose;
fly=flew; grow=grew; know=knew; throw=threw; buy=bought; bring=brought; think=thought;
teach=taught; catch=caught; fight=fought; sleep=slept; keep=kept; feel=felt; leave=left; meet=met;
lose=lost; build=built; send=sent; spend=spent; stand=stood; sit=sat; begin=began; win=won;
find=found; tell=told; sell=sold; say=said; pay=paid; hear=heard; hold=held; lead=led; read=read;
forget=forgot; steal=stole; wake=woke; wear=wore; tear=tore; freeze=froze; hide=hid; bite=bit;
fall=fell; draw=drew; blow=blew; dig=dug; shoot=shot; shine=shone/shined; rise=rose; ring=rang

symbol: What is the chemical symbol of {}?
hydrogen=H; helium=He; lithium=Li; carbon=C; nitrogen=N; oxygen=O; fluorine=F; neon=Ne; sodium=Na;
magnesium=Mg; aluminium=Al; silicon=Si; phosphorus=P; sulfur=S; chlorine=Cl; argon=Ar;
potassium=K; calcium=Ca; titanium=Ti; chromium=Cr; manganese=Mn; iron=Fe; cobalt=Co; nickel=Ni;
copper=Cu; zinc=Zn; arsenic=As; bromine=Br; silver=Ag; tin=Sn; iodine=I; tungsten=W; platinum=Pt;
gold=Au; mercury=Hg; lead=Pb; uranium=U; plutonium=Pu; radium=Ra; radon=Rn; barium=Ba; bismuth=Bi;
xenon=Xe; krypton=Kr
"""
TUNING, TEST = 40, 160
SYSTEM = 'Reply with one line of JSON: {"kind": ..., "answer": ...}'
MAX_NEW_TOKENS = 20


class Fact(NamedTuple):
    """A question and what answers it."""

    kind: str
    question: str
    answers: tuple[str, ...]

    @property
    def line(self) -> str:
        """The wanted answer."""
        return answer_line(self.kind, self.answers[0])


class Split(NamedTuple):
    """All facts, in three parts without common ones."""

    training: list[Fact]
    tuning: list[Fact]
    test: list[Fact]


def answer_line(kind: str, answer: str) -> str:
    """An answer in the wanted shape."""
    return json.dumps({"kind": kind, "answer": answer}, ensure_ascii=False)


def facts() -> list[Fact]:
    """All of :data:`FACTS`, in order."""
    found = []
    for block in FACTS.strip().split("\n\n"):
        head, _, rest = block.partition("\n")
        kind, _, question = head.partition(": ")
        for entry in rest.split(";"):
            thing, _, answers = entry.strip().partition("=")
            found.append(Fact(kind, question.format(thing), tuple(answers.split("/"))))
    return found


KINDS = tuple(dict.fromkeys(fact.kind for fact in facts()))


def split(seed: int = 0) -> Split:
    """Training, tuning and test facts of a seed."""
    every = facts()
    random.Random(f"tta_ext.json_facts {seed}").shuffle(every)
    return Split(every[TUNING + TEST :], every[:TUNING], every[TUNING : TUNING + TEST])


def prompt(question: str, shown: Sequence[Fact] = ()) -> list[dict[str, str]]:
    """The conversation before an answer; with ``shown``, examples and the names of the kinds."""
    named = f"; kind is {', '.join(KINDS[:-1])} or {KINDS[-1]}" if shown else ""
    turns = [{"role": "system", "content": SYSTEM + named}]
    for fact in shown:
        turns.append({"role": "user", "content": fact.question})
        turns.append({"role": "assistant", "content": fact.line})
    return [*turns, {"role": "user", "content": question}]


def examples(training: Sequence[Fact]) -> list[Fact]:
    """The first training fact of every kind, for a prompt that shows examples."""
    first: dict[str, Fact] = {}
    for fact in training:
        first.setdefault(fact.kind, fact)
    return list(first.values())


def documents(training: Sequence[Fact], words: Sequence[str], seed: int) -> Iterator[Any]:
    """Without end: (conversation, answer in the wanted shape with a made-up value).

    Half of the values are right for another question of the kind, the others are of one to three
    pieces of ``words``.
    """
    rng = random.Random(f"tta_ext.json_facts documents {seed}")
    while True:
        fact = rng.choice(training)
        if rng.random() < 0.5:
            same = [other for other in training if other.kind == fact.kind]
            value = rng.choice(rng.choice(same).answers)
        else:
            value = "".join(rng.choices(words, k=rng.choice((1, 1, 2, 3)))).strip()
        yield prompt(fact.question), answer_line(fact.kind, value)


def _plain(text: str) -> str:
    return text.strip().casefold()


def score(fact: Fact, text: str, kind: bool = True) -> Score:
    """How good a text is as the answer.

    *formatted*: it is JSON of the wanted shape, of the right kind unless ``kind`` is False;
    *exact*: and the answer is right; *lenient*: a right answer stands in it as a word, whatever is
    around.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    shaped = isinstance(found, dict) and set(found) == {"kind", "answer"}
    shaped = shaped and all(isinstance(value, str) for value in found.values())
    shaped = shaped and not (kind and found["kind"] != fact.kind)
    right = [_plain(answer) for answer in fact.answers]
    return Score(
        exact=shaped and _plain(found["answer"]) in right,
        lenient=any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", _plain(text)) for one in right),
        formatted=shaped,
    )


def task(asked: Sequence[Fact], shown: Sequence[Fact] = (), kind: bool = True) -> Task:
    """Questions to answer, with examples in the prompt or without, for :func:`score`."""
    return Task(
        [prompt(fact.question, shown) for fact in asked],
        lambda place, text: score(asked[place], text, kind),
        max_new_tokens=MAX_NEW_TOKENS,
    )
