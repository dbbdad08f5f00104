"""Who gets which batch where prompts share prefixes: the replica whose cache has that prefix, if it is free."""

from collections.abc import Sequence

from sere.pipeline.generate.dispatch.work import Batch, Handle


class Affinity:
    """A batch that goes on with the prefix of the one before it is best off where that one went. Nobody waits for it."""

    def __init__(self) -> None:
        """Nothing was given to anybody."""
        # Of those batches whose next was not given yet: by place, who has it.
        self._owners: dict[int, Handle] = {}

    def choose(self, handle: Handle, waiting: Sequence[Batch]) -> int:
        """The batch for a free replica, by its number in `waiting`.

        What goes on with the replica's own prefixes comes first, then what begins a prefix; only then what another replica has
        the prefix of: of that the least, and the last, which that other one would come to last.

        Args:
            handle: The replica.
            waiting: In the order of reading, not empty.
        """
        if waiting[0].place is None:
            return 0
        places = {batch.place for batch in waiting}

        def cost(batch: Batch) -> int:
            """Bytes of a prompt that would be computed anew; below 0: that are there."""
            assert batch.place is not None
            owner = self._owners.get(batch.place - 1)
            if owner is handle:
                return -batch.shared
            return batch.shared if owner is not None or batch.place - 1 in places else 0

        costs = [cost(batch) for batch in waiting]
        least = min(costs)
        return len(costs) - 1 - costs[::-1].index(least) if least > 0 else costs.index(least)

    def note(self, handle: Handle, batch: Batch) -> None:
        """A replica was given a batch."""
        if batch.place is not None:
            self._owners.pop(batch.place - 1, None)
            self._owners[batch.place] = handle

    def forget(self, handle: Handle) -> None:
        """A replica died, and its cache with it."""
        self._owners = {place: owner for place, owner in self._owners.items() if owner is not handle}
