"""Everyday sentences, written for the demo: what people say, read and note down, on many subjects and of many lengths."""

from __future__ import annotations

__all__ = ["everyday_sentences"]

_SENTENCES = """
The bus was late again, so I walked the last two stops in the rain.
Could you pick up some bread on your way home?
She laughed so hard that she dropped her spoon.
Two dogs are chasing a ball across a muddy field.
The meeting has been moved to Thursday afternoon.
My grandmother keeps her buttons in an old biscuit tin.
Turn left at the bakery and go on until you see the bridge.
It snowed all night, and in the morning the street was silent.
A boy in a red jacket climbs the rope ladder.
The new library opens next month, with a reading room for children on the second floor.
Nobody knows who painted the blue door.
He has been learning the violin for three years and still hates practising scales.
Please turn off the lights when you leave.
The soup needs a little more salt.
Several flights were cancelled because of the storm.
I forgot my umbrella on the train.
The city council voted to close the old town to cars at weekends.
Three women are talking beside a fruit stall.
We ran out of milk, so there will be no pancakes today.
What time does the pharmacy close?
An empty boat drifted slowly down the river.
The price of coffee has doubled since last winter.
Her flight lands at half past six, but she still has to collect her luggage and get through the traffic.
The children built a tent out of blankets and chairs.
A tall man is repairing a bicycle on the pavement.
I would rather stay in tonight and watch a film.
The home team won by a single point in the last minute.
This soap smells of lavender.
Don't forget to water the tomatoes.
The fire brigade brought a cat down from the roof of the school.
He apologised, but it did not sound as though he meant it.
The train to the coast leaves from platform nine.
A woman slices onions on a wooden board.
The weather will be dry and mild, with some cloud in the evening.
My phone battery never lasts the whole day.
They have lived above the shop for almost forty years.
The museum is free on the first Sunday of the month.
A small plane is flying low over the lake.
Can I return these shoes without the receipt?
The baby finally fell asleep at two in the morning.
Farmers say that the long drought has cost them half of the harvest.
The lift is out of order; please use the stairs.
He drew a map on the back of an envelope and told us to keep the river on our right until the second mill.
People are dancing in the square.
The dentist said I should come back in six months.
Her handwriting is so small that I need my glasses.
The committee has not yet decided where the next games will be held.
A black horse stands under a tree.
We spent the whole weekend painting the kitchen yellow.
The shop across the road sells nothing but lamps.
I have never seen so many stars.
The lecture was interesting, though a bit too long.
A girl is blowing out the candles on a cake.
The factory will hire two hundred workers before the end of the year.
You should let the dough rest for an hour before you roll it out.
His car would not start this morning.
A group of cyclists stops at a crossing.
The river rose by a metre overnight and flooded the lower gardens.
She speaks four languages, but she says that she dreams in only one.
The old cinema has been turned into a climbing hall.
Is there a seat free next to you?
A man wearing a straw hat is selling ice cream.
The film is based on a true story.
I burned the toast again.
The bank lowered its interest rate for the second time this year.
Someone left the gate open and the sheep got out.
The doctor told him to drink more water and to sleep at least seven hours.
A kitten is playing with a ball of wool.
Our neighbours are moving to the countryside in spring.
The bridge will be closed to lorries until it has been repaired.
My brother collects stamps from countries that no longer exist.
The waiter brought the wrong dish, but it was so good that nobody complained.
Two children share a sledge down the hill.
The exam starts at nine, so be there a quarter of an hour before.
The minister refused to answer questions about the new tax.
I like my tea strong and without sugar.
Waves break against the harbour wall.
The keys are under the flower pot.
She finished the marathon in just under four hours.
The lights went out in the middle of the concert, and the choir simply went on singing.
There is a hole in my left sock.
A painter stands on a ladder in front of a white house.
The parcel was delivered to the wrong address.
Researchers have found a new kind of frog in the mountains.
Let's meet at the fountain at noon.
He reads the newspaper from back to front, beginning with the sports pages.
The leaves are turning red and gold.
The price includes breakfast and a towel.
A crowd waits outside the stadium.
My sister wants to become a vet.
The roof leaks whenever the wind comes from the west.
The court will announce its decision on Friday.
I can't find the other glove.
Stir the sauce over a low heat until it thickens, and take it off before it boils.
A train passes behind the houses.
The teacher wrote the answer on the board and wiped it off again at once.
Prices for second-hand cars fell slightly last month.
He is allergic to nuts, so please check the label.
The path along the cliff is steep, but the view is worth it.
A woman in a wheelchair is throwing a basketball.
The last guests left long after midnight.
Do you have this shirt in a larger size?
The volcano has been quiet for more than a century.
We took the wrong motorway exit and ended up at the airport.
The boy next door practises the drums every single evening.
Fresh snow covers the roofs of the village.
The company apologised for the delay and offered its customers a refund.
I've been waiting on the phone for twenty minutes.
Bees are crawling over the lavender.
The new teacher is strict but fair.
A police officer is directing the traffic.
My father makes the best potato salad, and he will not tell anyone how.
The ferry takes about an hour if the sea is calm.
The printer is jammed again.
Voters in the north go to the polls on Sunday.
An old couple is feeding ducks by the pond.
She plays chess against her computer and complains that it cheats.
The hotel was cheap, clean and close to the beach.
What a beautiful morning!
The surgeon washed her hands and put on a fresh pair of gloves.
A waiter is carrying three plates on one arm.
It took us an hour to find a parking space.
The school choir will sing in the market hall on Saturday.
I need to renew my passport before the summer.
The dog barks at everyone except the postman.
Engineers are testing a tram that runs without overhead wires.
He sold his guitar to pay the rent and has regretted it ever since.
The window is stuck.
A child is drawing a sun with yellow chalk.
Unemployment fell to its lowest level in ten years.
You can borrow my notes if you promise to bring them back.
The fog was so thick that we could not see the end of the pier.
A squirrel runs along the fence.
The play has been sold out for weeks.
Her new flat has high ceilings and a tiny kitchen.
The tyres of the lorry left deep tracks in the mud.
Sorry, I didn't catch your name.
The orchestra tuned its instruments while the audience settled down.
Doctors warn that the flu is arriving earlier than usual.
I planted some garlic along the edge of the bed to keep the snails away from the lettuce.
A man and a woman are walking along the beach.
The battery has to be charged before its first use.
They argued about the map for so long that it got dark.
The cheese is made from goat's milk.
Thieves stole a painting from a small museum near the border.
He whistles when he is nervous.
Two men are loading a piano into a van.
The last question was the hardest.
We grow beans, peas and far too many courgettes.
The radio said there would be thunder later.
Her grandfather was a lighthouse keeper, and she still has his brass lamp.
A cyclist was slightly hurt when a car door opened in front of her.
The plaster on the ceiling has begun to crack.
I would like a window seat, please.
The cat has been sitting in front of the empty bowl since breakfast, looking deeply offended.
A swimmer dives from the high board.
The kingdom was divided among three brothers.
Most of the shops here close for lunch.
The strike ended after the two sides agreed on higher wages.
My knee hurts when I climb stairs.
An elephant is spraying itself with dust.
The recipe calls for two eggs, but one will do.
The moon rose late and very large.
He has lost weight since he started cycling to work.
The committee thanked the volunteers for their help.
Where did you learn to cook like that?
Several people are waiting for the bus under a shelter.
The glass fell off the table but did not break.
The airline has ordered thirty new planes, the first of which are to be delivered in two years.
There's something wrong with the washing machine.
A young woman is reading a book on a bench.
I owe you an apology and probably a coffee.
The island can be reached on foot at low tide.
The fence needs a coat of paint.
Her team is looking for a better way to store energy from the sun and the wind.
A goat stands on top of a rock.
The second half of the book is much better than the first.
They named the puppy Biscuit.
The harbour was full of fishing boats.
Snow is expected above a thousand metres.
My shoes are still wet from yesterday.
The judge asked the jury to ignore the last remark.
A man is chopping wood behind a cabin.
If the tickets are too expensive we can listen from the park outside.
The clock in the hall is ten minutes fast.
Scientists say the glacier is melting twice as fast as they had thought.
She tied a ribbon round the box.
How long have you been working here?
Two girls are jumping on a trampoline.
The coat was too big for him, but it was warm.
The oldest tree in the park came down in last night's gale.
I set three alarms and slept through all of them.
The government plans to build more homes on the edge of the city.
A chef is tossing a pizza into the air.
There were footprints in the wet cement.
The jam did not set, so we call it syrup.
The ambulance arrived within minutes.
He always sits at the same table by the window.
Passengers are asked not to leave their bags unattended.
A bird has built its nest in the letter box.
The course is meant for people who have never used a computer.
Her voice was hoarse from cheering.
Would you mind closing the door?
The old mill by the stream is for sale, along with the meadow behind it and a boat without oars.
A surfer carries his board across the sand.
Oil prices rose sharply on Monday.
I like the smell of rain on hot stones.
The bridge was built without a single nail.
The patient is recovering well and may go home tomorrow.
A little girl is hiding behind a curtain.
They serve breakfast until eleven.
The runner slipped on the last corner and still came second.
My uncle repairs clocks, mostly for friends.
The lake freezes over every January.
Rescuers found the missing hikers in a hut, cold and hungry but unharmed.
The blue paint is still wet.
A musician is playing the accordion in the underground.
He promised to call but never did.
The mayor opened the market with a short speech.
We had to push the car up the last bit of the hill.
This cake is gone by the time the coffee is ready.
Two horses are pulling a cart full of hay.
The invoice must be paid within thirty days.
The stairs creak, so take off your shoes if you come home late.
The champion lost her first match of the season.
Fold the paper in half and cut along the line.
A lorry has overturned on the motorway, and there are long queues in both directions.
Grandpa tells the same three jokes every Christmas.
The garden is small but gets the sun all day.
A man in a suit is running for a taxi.
Thank you for the lovely evening.
We met on a night train. He had the upper bunk and snored; she had brought cards and more plums than anyone could eat.
The plumber came twice, found nothing and left a bill. On the third day the tap stopped dripping by itself.
Nobody had expected the small bookshop to survive, but the whole street comes to its readings.
Take the medicine with a meal. If you miss a dose, do not take two the next time.
The bus driver waited for the old man, who waved his stick in thanks. Then a boy ran up too, and she waited again.
I was going to write to you last week. Then the boiler broke, the children caught a cold, and here we are.
The vote was close: forty-nine in favour, forty-seven against, and four who stayed at home.
Cut the apples into thin slices and lay them on the dough. Sprinkle with sugar and bake for half an hour.
After the storm the beach was covered with shells, seaweed and a single orange boot.
They open at eight. By then the queue reaches round the corner, past the chemist and the shoe shop.
Although the new road has cut the journey to the capital by an hour, people in the villages miss the passing trade.
She put the letter back into the drawer. Some things, she thought, are better answered in person.
"""


def everyday_sentences() -> list[str]:
    """Give some two hundred different sentences of everyday English, in a fixed order that mixes their subjects.

    Example:
        >>> everyday_sentences()[1]
        'Could you pick up some bread on your way home?'
    """
    return _SENTENCES.strip().splitlines()
