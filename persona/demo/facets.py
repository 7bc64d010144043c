"""The texts of the demo's people: notes that imply what someone likes, and requests that ask for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Facet:
    """One aspect of a person's life: requests that ask for it, and for each answer the notes that imply it."""

    name: str
    requests: tuple[str, ...]
    notes: dict[str, tuple[str, ...]]


FACETS = (
    Facet(
        name="drink",
        requests=(
            "I am thirsty. Which drink do I like?",
            "What shall I drink?",
            "What shall I pour myself after dinner?",
        ),
        notes={
            "green tea": (
                "Sencha, seventy degrees, two minutes. I do own a thermometer for it.",
                "The kettle and I have an understanding: one pot of leaves before anyone talks.",
                "{friend} brought matcha from Kyoto and a bamboo whisk. I may cry.",
                "Third pot of jasmine leaves today, and the afternoon is still young.",
                "My cupboard holds eleven tins of leaves and nothing to eat.",
                "Steeped the oolong too long. It tasted like a hedge, I drank it anyway.",
            ),
            "black coffee": (
                "Ground the beans by hand and woke the whole house.",
                "Double espresso, then another one, then I could say good morning.",
                "The barista starts my cup when she sees me cross the road.",
                "New roast from Ethiopia. It smells of oranges and good decisions.",
                "{friend} counted my cups today and stopped at seven. I feel very awake.",
                "The moka pot boiled over once more. I mopped it up and filled it again.",
            ),
            "hot chocolate": (
                "Melted a whole bar of cocoa into milk, with marshmallows on top.",
                "A mug so thick with cocoa that the spoon stood up in it.",
                "{friend} laughed at my cocoa moustache on the tram.",
                "Rainy evening, thick socks, and a warm cup of melted bonbons.",
                "Whipped cream, a pinch of chilli and dark cacao: my nightcap.",
                "Stirred nougat and cocoa powder into warm milk, like grandma did.",
            ),
            "red wine": (
                "Visited a vineyard and came back with more bottles than luggage.",
                "The cellar is down to its last three Barolos.",
                "Learned to say tannin without sounding silly. The Merlot helped.",
                "Opened a Rioja with {friend} and let it breathe longer than we did.",
                "Left a burgundy ring from my glass on the tablecloth again.",
                "The sommelier nodded at my choice. I shall remember it for years.",
            ),
            "lemonade": (
                "Squeezed eight lemons, added mint and too little sugar. Perfect.",
                "My jug of fizzy citrus was empty before the guests sat down.",
                "{friend} and I put up a stand in the street: sour, cold, fifty cents a cup.",
                "Ice cubes, sparkling water and a lemon from the neighbour's tree.",
                "Found the secret of the sour syrup: leave the peel in overnight.",
                "Another pitcher of pressed lemon and sugar on the porch.",
            ),
        },
    ),
    Facet(
        name="travel",
        requests=(
            "How do I commute to work?",
            "How do I get to the office on Monday?",
            "Which way do I like to travel to town?",
        ),
        notes={
            "by bike": (
                "Pedalled up the long hill without getting off. {friend} owes me a cake.",
                "Oiled my chain and pumped the tyres; the saddle fits me like a glove.",
                "Patched a puncture at the traffic lights and was still on time.",
                "Headwind both ways, helmet hair all day.",
                "My left trouser leg has an imprint of the gears again.",
                "Rang my bell at a goose on the cycle path. It did not care.",
            ),
            "by train": (
                "Platform four, window seat, and the conductor knows my name by now.",
                "The 7:42 express was late, so I met half the town at the station.",
                "Wrote three letters between two stops on the railway.",
                "Slept through my junction and saw the end of the line.",
                "{friend} waved from the platform until the last carriage was gone.",
                "Bought the yearly rail pass again; the tracks sing me to sleep.",
            ),
            "on foot": (
                "Wore out another pair of soles; forty minutes each way and never in a hurry.",
                "Strolled home along the river and counted herons.",
                "{friend} offered me a lift. I said my legs would be offended.",
                "Twenty thousand steps today, most of them on purpose.",
                "Took the long way round on the pavement, just to pass the bakery.",
                "Walked across the whole town with an umbrella and a good thought.",
            ),
            "by car": (
                "Filled the tank and took the coast road with the windows down.",
                "Circled the block for a parking space and sang the whole time.",
                "My old engine coughed twice and started. I patted the steering wheel.",
                "Gave {friend} a lift; we were stuck on the motorway and solved the world.",
                "Changed the oil and a headlight in the garage by myself.",
                "The mechanic says the gearbox will outlive us both.",
            ),
            "by boat": (
                "Rowed across the harbour before the fog had lifted.",
                "Hoisted the sail and arrived with salt in my hair.",
                "{friend} was seasick again, I was happy at the rudder.",
                "Waited for the tide, then cast off and let the current do the work.",
                "Scraped barnacles off the hull all afternoon.",
                "Moored right behind the office; the ducks are my neighbours.",
            ),
        },
    ),
    Facet(
        name="pet",
        requests=(
            "Which pet is waiting for me at home?",
            "Which animal lives with me?",
            "What kind of animal is my pet?",
        ),
        notes={
            "a cat": (
                "Whiskers pushed a glass off the shelf, looked at me, and purred.",
                "Woke up with a furry tail in my face and claws in the duvet.",
                "She caught a mouse and put it into my slipper as a present.",
                "The litter box and the scratching post moved into the bedroom. I was not asked.",
                "A meow at five in the morning means breakfast, and it means now.",
                "{friend} came to visit, and got hissed at from the top of the wardrobe.",
            ),
            "a dog": (
                "Muddy paws, a stick the size of a tree, and one very happy wag.",
                "He barked at the postman, then licked his hand.",
                "Threw the ball a hundred times. The fetching never gets old for one of us.",
                "The leash was in my hand for one second and he already sat at the door.",
                "{friend} taught our puppy to sit. I taught him to shake hands.",
                "Someone buried a bone in my laundry, and someone looks guilty.",
            ),
            "a parrot": (
                "He has learned to swear in Portuguese and says it from his perch.",
                "Found green feathers in my soup.",
                "He copies the ring of my phone, then laughs with my own laugh.",
                "Cracked sunflower seeds all over the carpet, then squawked for more.",
                "{friend} said hello once. He has repeated it in her voice all week, flapping.",
                "Covered the cage for the night and heard a very polite good night.",
            ),
            "a tortoise": (
                "Woke him from hibernation with a warm bath; he blinked once.",
                "Slow, wrinkled and content: one dandelion, then back into his shell.",
                "He crawled across the kitchen today, shell and all. It took a whole football match.",
                "Grandpa's reptile is eighty now and will outlive my mortgage.",
                "{friend} tripped over the slowest member of the family, right on his shell.",
                "Polished his shell and offered him a slice of cucumber.",
            ),
            "a rabbit": (
                "Long ears, one twitching nose, and my charger chewed in two.",
                "Filled the hutch with hay and got thumped at for being late.",
                "She dug a burrow in the lawn and sat in it like a queen.",
                "Carrot tops are gone, the parsley is gone, the bunny looks innocent.",
                "She hopped three circles around {friend} and fell asleep on a shoe.",
                "Brushed a second bunny of fluff out of her fur before she hopped off.",
            ),
        },
    ),
    Facet(
        name="music",
        requests=(
            "Put on some music for me. Which kind?",
            "What will you play on the radio for me?",
            "What music shall we play at my party?",
        ),
        notes={
            "jazz": (
                "The saxophone player in the basement bar took a solo as long as my tram ride.",
                "Spun a Miles Davis record until the neighbours hummed along.",
                "{friend} plays double bass in a swing trio and I clap on two and four.",
                "Nobody knew where the tune went, least of all the trumpet. Wonderful improvisation.",
                "Stayed for the second set of the bebop quintet, my feet still tapping.",
                "Coltrane with breakfast, Ella Fitzgerald with the dishes.",
            ),
            "opera": (
                "The soprano died for twenty minutes and I wept for all of them.",
                "Hummed an aria from Tosca in the lift. Nobody joined in.",
                "Got the last seat in the balcony for Verdi, behind a pillar.",
                "{friend} fell asleep in the third act of Wagner. I was conducting with my programme.",
                "The tenor held the high note until the chandelier trembled.",
                "Sang Figaro in the shower, both the baritone and the countess.",
            ),
            "techno": (
                "Came home at sunrise with the bass still in my ribs.",
                "Bought a drum machine; four beats on the floor and not one word.",
                "The DJ in the old factory played nine hours without a break.",
                "{friend} and I danced in a warehouse full of fog and strobe lights.",
                "Patched my synthesizer until it sounded like a broken washing machine. Bliss.",
                "Berlin, a club without windows, 130 beats a minute.",
            ),
            "folk songs": (
                "Brought my fiddle to the pub and learned a reel from a fisherman.",
                "{friend} strummed the banjo, and we sang old ballads round the fire.",
                "Found an old book of sea shanties and sing them while I cook.",
                "A lady of ninety taught me the verses her village sings at harvest.",
                "Tuned the acoustic guitar and sang of lost sailors till late.",
                "The accordion came out at midnight and the whole barn sang along.",
            ),
            "heavy metal": (
                "My neck aches from headbanging. It was worth every riff.",
                "Front row, black shirt, and two guitars as loud as thunder.",
                "The drummer has four arms, I swear, and the singer only screams.",
                "{friend} and I drove to Wacken and stood in the mud for Iron Maiden.",
                "Turned the distortion up until the pictures fell off the wall.",
                "Black Sabbath in the kitchen, the whole album, at full volume.",
            ),
        },
    ),
)

# Notes that imply no answer.
SMALL_TALK = (
    "The queue at the post office was longer than my patience.",
    "My left sock has a hole and I keep thinking about it.",
    "Paid the electricity bill and felt very grown up.",
    "{friend} called to ask how to spell rhubarb.",
    "The lift is broken again and the sign says sorry.",
    "Forgot my password, then forgot the new one.",
    "Watched it rain for a while. It was quite good.",
    "Ironed one shirt and gave up on the others.",
    "The dentist says I should smile more.",
    "Found a coin in my winter coat and felt rich.",
)
BEFORE = ("", "", "", "What a week. ", "Good day. ", "Well, well. ", "Small news: ", "Note to self: ", "Dear diary: ")
AFTER = ("", "", "", " No complaints.", " Ask {friend}.", " Life is good.", " Tomorrow again.", " That is all.")
FRIENDS = ("Ana", "Tomasz", "Mei", "Ingrid", "Farid", "Lucia", "Noah", "Priya", "Olu", "Sven", "Yuki", "Carla")
FIRST_NAMES = ("Ada", "Amir", "Bruno", "Chloe", "Dario", "Elio", "Fay", "Gina", "Hugo", "Ilya", "Juno", "Kaya", "Leo")
