# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Adjectives and nouns for the retrieval tasks of `ruler`, which name needles and fill lists of words.

No word is part of another, so that the score of an answer, which looks for words anywhere in it, takes none for
another.
"""

ADJECTIVES = """
acid aged agile alert alive amber ample ancient angry arid awake aware bald bare basic bitter black bland blank
bleak blind blond blue blunt bold brave brief bright brisk bronze brown bulky bumpy busy calm careful casual cheap
cheerful civil classic clear clever close clumsy coarse cold common complex cool copper coral cosy crisp crooked
cruel curious curly daily damp daring dark dear decent deep defiant dense direct dirty distant dizzy double dreamy
drowsy dry dull dusty eager early easy elastic elder elegant empty endless equal exact exotic express extra faint
fair faithful false famous fancy fatal feeble fertile fierce final firm fit flat fluffy fond foolish foreign formal
frank free fresh frosty frozen full funny fussy fuzzy gaunt generous gentle genuine giant giddy glad gloomy glossy
golden good grand grateful gray great greedy green grim gritty grumpy guilty hairy handy happy harsh hasty hazy
healthy heavy helpful hidden high hollow holy horrid hostile hot huge humble humid hungry ideal idle immense inner
innocent jagged jealous jolly joyful junior keen kind lanky large lavish lazy lean legal level light likely liquid
lively local lonely long loose lost loud lovely loyal lucky lunar major maroon massive mature mellow merry messy
mighty mild minor misty modern modest moist moral muddy murky mute mutual naive nasty natural navy neat nervous
neutral nice nimble noble noisy normal novel numb obscure odd official olive only open orange oval pale paper
parallel partial patient peaceful perfect petite pink plain playful pleasant polite poor popular portly precious
pretty prickly primary prime private proud public puny pure purple quaint quick quiet quirky radical random rapid
rare raw ready real rebel recent red regal regular remote rich rigid ripe robust rosy rotten rough round royal rude
rural rusty sad safe sandy scarce scarlet secret secure senior serious severe shabby shaggy shallow shiny short shy
silent silky silly silver simple sincere single skinny sleepy slender slick slim slow small smart smooth snowy
sober social soft solar solemn solid sorry sour spare sparse special spicy spiky square stale stark steady steep
sticky stiff strange strict strong stubborn sturdy subtle sudden sunny super sweet swift tall tame tangy tart tasty
teal tender tense tepid thick thin thirsty tidy tight timid tiny tough tragic tricky tropic true ugly uneven unique
upper urban urgent useful usual vague valid vast velvet verbal vibrant violet vital vivid vocal warm wary weak
wealthy weary weird wet white whole wicked wide wild windy wise witty worn worthy wrong yellow young yummy zany
zealous
""".split()

NOUNS = """
acorn airport alley almond anchor angle animal ankle answer antler apple apron arch arena armor arrow artist ash
aspen atlas attic author autumn avenue badge bagel bakery balcony ball bamboo banana band bank banner barber barn
barrel basin basket beach beacon bead beak beam bean bear beaver bee bell belt bench berry bird biscuit blossom
board boat bolt bone bonnet book boot border bottle boulder box brass bread breeze brick bridge brush bubble bucket
buffalo bulb bull bundle bunny burger bush butler butter button cabin cable cactus cake camel camera canal candle
candy canoe canvas canyon captain caravan carbon carpet carrot cart castle cat cave ceiling cellar cement chain
chair chalk channel chapel chapter cheese cheetah cherry chess chest chicken chief child chimney chin chorus church
cider circle circus city clam clay cliff clinic cloth clover clown club coach coast coat cobra cocoa coffee coin
collar college column comet compass cook corner cottage cotton couch council cousin cow crab cradle crane crater
crayon cream creek crew cricket crop crown crystal cube cup curtain cushion cycle dairy daisy dance deer desert
desk diamond diary dish doctor dolphin domino donkey door dove dragon dress drum duck dune eagle earth echo eel egg
elbow elephant elm emerald empire engine envelope estate event fabric factory falcon family farm father feather
fence fern ferry fiddle field fig finger fire fish flag flame flute fly fog forest fork fossil fountain fox frame
friar frog fruit funnel galaxy gallery garage garden garlic gate gazelle ghost giraffe glacier glass globe glove
glue goat goose gorilla grain grape grass gravel grove guard guest guitar gulf hammer hamster harbor harp hawk
hazel heart hedge hen herb heron hill hinge hippo hive honey hood hook horn horse hour house hut igloo inch infant
insect iron island ivory ivy jacket jaguar jam jar jelly jewel jockey journal judge juice jungle kayak kettle
kidney king kite kitten knee knife knot label lace ladder ladle lagoon lake lamb lamp lantern laser laurel lava
lawn lawyer leaf leather ledger legend lemon lens lesson letter lettuce library lily limb lime linen lion lizard
lobster lock lodge log lotus lumber lunch magnet maid mammal mango mantle map marble market mason mast meadow meal
medal melody melon member mentor metal meteor meter mill miner mirror mitten model mole moment monk month moon
morning moss mother motor mound mountain mouse mouth muffin mule muscle museum music mustard nail napkin neck
nectar needle neighbor nephew nest night noodle north nose nurse oak oasis ocean octopus office onion opera orbit
orchard orchid organ otter oven owl oyster paddle page paint palm panda panel panther parade parcel parent park
parrot party pasta path patio peach peacock peanut pearl pebble pedal pelican pencil penguin pepper person piano
picture pier pigeon pillow pilot pine pirate pizza planet plate plaza plow plum pocket poem poet pollen pond pony
poppy porch portrait potato powder prairie prince prize puddle pumpkin pupil puppet puzzle quail quarry quartz
queen quilt rabbit raccoon radar radio raft rail ranch raven record reef reptile ribbon rice rifle river road robe
robin robot rocket roof room root rope rose ruby rug ruler sailor salad salmon salt sandal satin sauce scarf school
scissor scooter seal season seed shadow shark sheep shelf shell shepherd shield ship shirt shoe shop shore shoulder
shovel shrimp signal singer sink sister skate skirt sky sled sleeve slipper smoke snake soap sock sofa soldier song
soup south spear spider spinach sponge spoon spring squid squirrel stable stadium stage stair stamp statue stem
stone stool storm story stove student studio sugar suit summer swan sword syrup tablet tail tank target teacher
team temple tent theater thief thimble thread throne thumb thunder ticket tiger timber toast tomato tongue tooth
torch tortoise tower town toy track tractor train tray treasure tree tribe trout truck trumpet trunk tulip tunnel
turkey turnip turtle tutor twig uncle uniform vanilla vapor vase vault vehicle vessel village vine violin visitor
voice volcano vulture wagon waiter walnut walrus wasp water wave wax weasel weaver web week whale wharf wheat
whisker whistle willow window wine wing winter wizard wolf wood wool worker world worm wrist writer yacht yard
yogurt zebra zipper
""".split()
