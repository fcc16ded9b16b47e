"""Names for containers that were given none. Floor 1, pure."""

from __future__ import annotations

import random

ADJECTIVES = """
    able amber brave breezy bright brisk calm candid clever cobalt coral crisp daring deep eager early fair fast
    fearless fleet foggy free gentle gilded golden grand hardy hazy hidden honest indigo ivory jolly keen kind
    lively lofty lucky mellow merry misty modest noble northern pale patient plucky proud quick quiet ready roaming
    royal rugged salty serene sharp silent silver sleepy smooth southern stormy steady sturdy sunny swift tidal
    tranquil true vivid wandering warm western wild windy wise witty young zesty
""".split()  # noqa: SIM905
NOUNS = """
    albatross anchor barque beacon binnacle boatswain bosun bowsprit breaker brig buoy capstan captain caravel
    clipper compass cormorant corvette cove current cutter cyclone delta dinghy dolphin dory drifter eddy estuary
    fjord frigate galleon galley gannet gull halyard harbour hawser helm horizon hull isle jetty keel ketch kraken
    lagoon lantern lighthouse lugger mainsail marlin mast mate mizzen monsoon narwhal oar orca osprey packet pelican
    pilot pinnace porpoise quay raft reef rigging rudder sailor schooner seal sextant shanty skiff sloop spar
    spinnaker squall starboard strait swell tern tide tiller trawler trident voyage wake wave whaler wharf yawl
""".split()  # noqa: SIM905


def random_name(choose: random.Random, attempt: int = 0) -> str:
    """adjective_noun; after a few taken ones with a number."""
    name = f"{choose.choice(ADJECTIVES)}_{choose.choice(NOUNS)}"
    return name if attempt < 8 else f"{name}_{choose.randrange(10 ** min(9, attempt - 6))}"
