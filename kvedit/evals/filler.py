"""Filler: plain prose that says nothing about what is asked, for contexts to be hidden in."""

from __future__ import annotations

import random

from kvedit.errors import InvalidArgument

__all__ = ["filler"]

_SENTENCES = """
The path behind the mill follows the stream for a while and then climbs to the road.
Most of the windows on the north side were replaced in the spring.
A pot of soup stood on the stove, and nobody had touched it.
The choir meets on the second floor, above the room with the long tables.
In wet years the meadow stays soft until the middle of June.
The clock in the hall is a few minutes slow, as everyone in the house knows.
Two of the shelves hold maps, and the others hold letters and old bills.
The bus turns at the bakery and waits there before it goes back.
Some of the chairs were painted blue, and some were left as they were.
The dog sleeps near the door when the wind comes from the west.
A row of poplars marks the border between the two fields.
They talked about the weather, and then about the price of wood.
The stairs are narrow, so the piano had to be lifted through the window.
Every autumn the children collect chestnuts and keep them in a drawer.
The lamp on the landing flickers when the washing machine is on.
A thin layer of dust had settled on the books near the ceiling.
The ferry carries bicycles, but only in the front part of the deck.
He folded the newspaper and put it under the cushion of the bench.
The garden gate was left open, and the hens walked out into the lane.
On market days the square is full before the sun is up.
The teacher asked them to draw a house, and most of them drew their own.
There is a bench by the pond from which the whole valley can be seen.
The new curtains are heavier than the old ones and keep the room warm.
After the concert they walked home slowly, since the night was mild.
The carpenter measured the door twice before he cut the board.
Snow fell until noon, and then the clouds moved off to the east.
The kitchen smells of bread on Mondays and of soap on Saturdays.
A letter lay on the mat, with the stamp half torn away.
The orchard was planted long ago, and several of the trees are hollow.
She keeps her tools in a tin box with a broken handle.
The bridge is closed to carts while the planks are being changed.
From the tower one hears the trains, though one does not see them.
The soup needs salt, and the table needs another leg.
Visitors leave their coats in the small room beside the entrance.
The river is shallow here, and in summer one can wade across.
The painter works in the mornings, when the light is even.
An umbrella had been forgotten on the hook behind the counter.
The fence was mended with wire, which has since begun to rust.
At the end of the lane a sign points to the quarry.
The neighbours share a ladder, a wheelbarrow and a long rope.
"""


def filler(words: int, seed: int = 0) -> list[str]:
    """Returns sentences of at least ``words`` words together, in an order drawn by ``seed``.

    The forty sentences come again, in another order, when they are used up.

    Raises:
        InvalidArgument: if ``words`` is negative.
    """
    if words < 0:
        raise InvalidArgument(f"expected a number of words, found {words}")
    drawn = random.Random(seed)
    found: list[str] = []
    pool: list[str] = []
    while sum(len(sentence.split()) for sentence in found) < words:
        if not pool:
            pool = _SENTENCES.strip().splitlines()
            drawn.shuffle(pool)
        found.append(pool.pop())
    return found
