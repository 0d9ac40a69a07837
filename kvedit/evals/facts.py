"""Facts: a small table of well-known ones, and how to say and ask each kind.

Countries: capitals and currencies as in ISO 3166 and ISO 4217 usage, one widely used official
language each. Elements: symbols by IUPAC. Books: first-named author. Facts are nobody's property;
the table was written for this module, and for a model's prior it need not be complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kvedit.errors import UnknownName

__all__ = ["Fact", "Relation", "facts", "relations"]


@dataclass(frozen=True)
class Relation:
    """A kind of fact. ``{}`` stands for the subject; the value completes every prompt.

    Args:
        name: its name.
        prompt: the plain sentence without its value.
        past: the same in the past tense.
        paraphrases: other ways to ask.
    """

    name: str
    prompt: str
    past: str
    paraphrases: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact.

    Args:
        subject: whom it is about.
        value: its value.
        relation: its kind.
    """

    subject: str
    value: str
    relation: Relation

    def sentence(self, past: bool = False, value: str | None = None) -> str:
        """Returns it as a sentence without a full stop, with another value if one is given."""
        start = self.relation.past if past else self.relation.prompt
        return f"{start.format(self.subject)} {value or self.value}"


_RELATIONS = (
    Relation(
        "capital",
        "the capital of {} is",
        "the capital of {} was",
        (
            "{}'s capital city is",
            "The seat of government of {} is in the city of",
            "The city that serves as the capital of {} is",
        ),
    ),
    Relation(
        "currency",
        "the currency of {} is the",
        "the currency of {} was the",
        (
            "{}'s currency is the",
            "In {}, people pay in a currency called the",
            "The money used in {} is the",
        ),
    ),
    Relation(
        "language",
        "the official language of {} is",
        "the official language of {} was",
        (
            "{}'s official language is",
            "In {}, the government writes its laws in",
            "The language officially used in {} is",
        ),
    ),
    Relation(
        "symbol",
        "the chemical symbol of {} is",
        "the chemical symbol of {} was",
        (
            "Chemists write {} with the symbol",
            "In the periodic table, {} is written as",
            "The symbol that stands for {} is",
        ),
    ),
    Relation(
        "author",
        "the author of {} is",
        "the author of {} was",
        (
            "{} was written by",
            "The writer of the book {} is",
            "The person who wrote {} is",
        ),
    ),
)

_COUNTRIES = """
Argentina|Buenos Aires|peso|Spanish
Australia|Canberra|dollar|English
Austria|Vienna|euro|German
Bangladesh|Dhaka|taka|Bengali
Belarus|Minsk|ruble|Belarusian
Bolivia|Sucre|boliviano|Spanish
Brazil|Brasilia|real|Portuguese
Bulgaria|Sofia|lev|Bulgarian
Cambodia|Phnom Penh|riel|Khmer
Canada|Ottawa|dollar|English
Chile|Santiago|peso|Spanish
China|Beijing|yuan|Chinese
Colombia|Bogota|peso|Spanish
Cuba|Havana|peso|Spanish
Czechia|Prague|koruna|Czech
Denmark|Copenhagen|krone|Danish
Egypt|Cairo|pound|Arabic
Estonia|Tallinn|euro|Estonian
Ethiopia|Addis Ababa|birr|Amharic
Finland|Helsinki|euro|Finnish
France|Paris|euro|French
Georgia|Tbilisi|lari|Georgian
Germany|Berlin|euro|German
Ghana|Accra|cedi|English
Greece|Athens|euro|Greek
Haiti|Port-au-Prince|gourde|French
Honduras|Tegucigalpa|lempira|Spanish
Hungary|Budapest|forint|Hungarian
Iceland|Reykjavik|krona|Icelandic
India|New Delhi|rupee|Hindi
Indonesia|Jakarta|rupiah|Indonesian
Iran|Tehran|rial|Persian
Iraq|Baghdad|dinar|Arabic
Ireland|Dublin|euro|Irish
Israel|Jerusalem|shekel|Hebrew
Italy|Rome|euro|Italian
Jamaica|Kingston|dollar|English
Japan|Tokyo|yen|Japanese
Jordan|Amman|dinar|Arabic
Kazakhstan|Astana|tenge|Kazakh
Kenya|Nairobi|shilling|Swahili
Kuwait|Kuwait City|dinar|Arabic
Laos|Vientiane|kip|Lao
Latvia|Riga|euro|Latvian
Lebanon|Beirut|pound|Arabic
Lithuania|Vilnius|euro|Lithuanian
Malaysia|Kuala Lumpur|ringgit|Malay
Malta|Valletta|euro|Maltese
Mexico|Mexico City|peso|Spanish
Mongolia|Ulaanbaatar|tugrik|Mongolian
Morocco|Rabat|dirham|Arabic
Mozambique|Maputo|metical|Portuguese
Nepal|Kathmandu|rupee|Nepali
the Netherlands|Amsterdam|euro|Dutch
New Zealand|Wellington|dollar|English
Nigeria|Abuja|naira|English
Norway|Oslo|krone|Norwegian
Pakistan|Islamabad|rupee|Urdu
Panama|Panama City|balboa|Spanish
Paraguay|Asuncion|guarani|Spanish
Peru|Lima|sol|Spanish
the Philippines|Manila|peso|Filipino
Poland|Warsaw|zloty|Polish
Portugal|Lisbon|euro|Portuguese
Qatar|Doha|riyal|Arabic
Romania|Bucharest|leu|Romanian
Russia|Moscow|ruble|Russian
Saudi Arabia|Riyadh|riyal|Arabic
Senegal|Dakar|franc|French
Serbia|Belgrade|dinar|Serbian
Slovakia|Bratislava|euro|Slovak
Slovenia|Ljubljana|euro|Slovene
South Korea|Seoul|won|Korean
Spain|Madrid|euro|Spanish
Sweden|Stockholm|krona|Swedish
Switzerland|Bern|franc|German
Syria|Damascus|pound|Arabic
Tanzania|Dodoma|shilling|Swahili
Thailand|Bangkok|baht|Thai
Tunisia|Tunis|dinar|Arabic
Turkey|Ankara|lira|Turkish
Ukraine|Kyiv|hryvnia|Ukrainian
Uruguay|Montevideo|peso|Spanish
Vietnam|Hanoi|dong|Vietnamese
Zambia|Lusaka|kwacha|English
"""

_ELEMENTS = """
hydrogen|H
helium|He
lithium|Li
carbon|C
nitrogen|N
oxygen|O
fluorine|F
neon|Ne
sodium|Na
magnesium|Mg
aluminium|Al
silicon|Si
phosphorus|P
sulfur|S
chlorine|Cl
argon|Ar
potassium|K
calcium|Ca
titanium|Ti
chromium|Cr
manganese|Mn
iron|Fe
cobalt|Co
nickel|Ni
copper|Cu
zinc|Zn
arsenic|As
bromine|Br
silver|Ag
tin|Sn
iodine|I
barium|Ba
tungsten|W
platinum|Pt
gold|Au
mercury|Hg
lead|Pb
radium|Ra
uranium|U
plutonium|Pu
"""

_BOOKS = """
Hamlet|Shakespeare
Don Quixote|Cervantes
War and Peace|Tolstoy
Crime and Punishment|Dostoevsky
Oliver Twist|Dickens
Emma|Austen
Frankenstein|Shelley
Dracula|Stoker
Ulysses|Joyce
Faust|Goethe
The Trial|Kafka
The Stranger|Camus
Candide|Voltaire
The Odyssey|Homer
The Aeneid|Virgil
The Divine Comedy|Dante
The Old Man and the Sea|Hemingway
The Great Gatsby|Fitzgerald
Moby Dick|Melville
Walden|Thoreau
Les Misérables|Hugo
Madame Bovary|Flaubert
Animal Farm|Orwell
Brave New World|Huxley
The Hobbit|Tolkien
Dune|Herbert
Foundation|Asimov
Beloved|Morrison
The Jungle Book|Kipling
The Time Machine|Wells
"""


def relations() -> tuple[str, ...]:
    """Returns the names of all kinds of facts."""
    return tuple(relation.name for relation in _RELATIONS)


@cache
def facts(relation: str) -> tuple[Fact, ...]:
    """Returns all facts of one kind.

    Raises:
        UnknownName: if there is no such kind.
    """
    kinds = {found.name: found for found in _RELATIONS}
    if relation not in kinds:
        raise UnknownName("relation", relation, kinds)
    tables = {"symbol": (_ELEMENTS, 1), "author": (_BOOKS, 1)}
    columns = {"capital": 1, "currency": 2, "language": 3}
    table, column = tables.get(relation) or (_COUNTRIES, columns[relation])
    rows = [line.split("|") for line in table.strip().splitlines()]
    return tuple(Fact(row[0], row[column], kinds[relation]) for row in rows)
