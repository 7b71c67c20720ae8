#include "calibration.h"

// Short and long, statements and questions, many subjects, some code, numbers and other languages: a layer's inputs should vary
// here as they do in use.  None of the golden sentences, which measure the result, is among them.
// NOLINTBEGIN(bugprone-suspicious-missing-comma): long texts take several lines
const std::vector<std::string> calibration_texts = {
    "A man is playing a guitar on the street.",
    "Two children are building a sand castle near the water.",
    "The woman slices an onion and puts it into the pan.",
    "A brown horse runs across the field while its rider waves.",
    "Someone is folding a piece of paper into the shape of a bird.",
    "The old dog slept under the kitchen table all afternoon.",
    "A group of people is dancing in front of a large stage.",
    "The boy fell off his bicycle but was not hurt.",
    "How can I reset my router to its factory settings?",
    "What is the capital of Australia, and why is it not Sydney?",
    "Is it safe to take ibuprofen together with antibiotics?",
    "Where can I find the nearest charging station for an electric car?",
    "Why does bread rise when it is baked?",
    "Which of these two phones has the better camera?",
    "Who wrote the opera that was first performed in Venice in 1853?",
    "Can you recommend a quiet restaurant for twelve people on a Friday evening?",
    "My parcel was marked as delivered, but nobody in the house has received it.",
    "Please cancel my subscription at the end of the month and confirm by mail.",
    "The app crashes whenever I rotate the screen while a video is playing.",
    "I would like to change the delivery address of order 4471-B to the office.",
    "Great value for money, but the battery lasts hardly half a day.",
    "The plot is thin and the dialogue wooden; only the photography saves this film from being a complete waste of two hours.",
    "An absorbing, beautifully acted drama that never once raises its voice.",
    "Terrible service: we waited forty minutes for cold soup and a wrong bill.",
    "The central bank left its key interest rate unchanged at 4.25 percent on Thursday, citing a cooling labour market.",
    "Shares of the chip maker rose 7 percent in early trading after it reported record revenue of $18.1 billion.",
    "At least nine people were injured when a bus collided with a truck on the motorway near the border, police said.",
    "The president met with leaders of the opposition to discuss the new budget, which parliament rejected last week.",
    "Heavy rain and strong winds are expected along the northern coast until Sunday morning.",
    "The home team won 3-1 after trailing at half time; the captain scored twice within four minutes.",
    "Researchers have found the remains of a Roman bath house beneath a car park in the centre of the town.",
    "The company said it would cut 1,200 jobs, about eight percent of its workforce, over the next two years.",
    "The defendant was sentenced to three years in prison for fraud and ordered to repay the money.",
    "Voters will decide in a referendum next spring whether the law comes into force.",
    "The boundary layer on a flat plate at zero incidence becomes turbulent when the Reynolds number based on the distance from "
    "the "
    "leading edge exceeds a critical value, which depends on the roughness of the surface and on the turbulence of the free "
    "stream.",
    "An approximate method is given for the calculation of the heat transfer to a blunt body in supersonic flow. The results are "
    "compared with measurements in a shock tube at Mach numbers between three and eight, and the agreement is found to be good "
    "except close to the stagnation point.",
    "The vibration of thin cylindrical shells under axial load is treated by an energy method. Frequencies were measured for "
    "shells "
    "with clamped ends, and the effect of internal pressure on the lowest mode is discussed.",
    "A theory of the lift on slender wings with leading edge separation is developed for small angles of attack. It predicts the "
    "position of the vortex sheets and the distribution of pressure over the span.",
    "We propose a neural network that reads a sentence from both directions at once. Trained on large amounts of unlabelled text, "
    "it "
    "can be adapted to a wide range of tasks with one additional output layer, and improves the state of the art on eleven of "
    "them.",
    "The mitochondrion is an organelle found in nearly all eukaryotic cells. It produces most of the cell's supply of adenosine "
    "triphosphate, which is used as a source of chemical energy, and takes part in signalling, differentiation and cell death.",
    "In this randomised, double-blind trial, 642 patients with type 2 diabetes received either 10 mg of the drug or a placebo once "
    "a "
    "day for 26 weeks. The primary end point was the change of glycated haemoglobin from baseline.",
    "The enzyme binds its substrate in a cleft between two domains; a single mutation at position 117 abolishes its activity.",
    "Plate tectonics explains how the outer shell of the Earth is divided into plates that glide over the mantle, and why "
    "earthquakes "
    "and volcanoes gather along their borders.",
    "Water boils at a lower temperature in the mountains because the pressure of the air is lower there.",
    "A prime number is a natural number greater than one that is not the product of two smaller natural numbers.",
    "Let f be a continuous function on a closed interval; then f attains its maximum and its minimum there.",
    "The French Revolution began in 1789 with the convocation of the Estates General and ended ten years later with the formation "
    "of "
    "the Consulate. Many of its ideas are considered fundamental principles of liberal democracy.",
    "Born in Warsaw, she moved to Paris in 1891, where she studied physics and mathematics and later became the first woman to win "
    "a "
    "Nobel Prize, and the only person to win it in two different sciences.",
    "The river rises in the Black Forest, flows through ten countries and reaches the sea after 2,850 kilometres.",
    "The cathedral was begun in 1248, left unfinished for three centuries, and completed according to the original plan in 1880.",
    "He had been warned about the house, of course, but warnings are for people with somewhere else to go. The door was not "
    "locked. "
    "Inside it smelled of apples and of rain, and on the table stood two cups of tea, one of them still warm.",
    "\"You can't be serious,\" she said, and laughed; but when she saw his face she put down the letter and sat very still.",
    "It was the kind of morning that makes even a post office look hopeful.",
    "To be honest, I did not expect much. Then the lights went down, the first violin came in a little too early, and nobody "
    "minded.",
    "Preheat the oven to 180 degrees. Whisk four eggs with 200 g of sugar until pale, fold in the flour and the melted butter, and "
    "bake "
    "for 35 minutes.",
    "Loosen the two screws at the back, slide the cover to the left and replace the filter. Do not use the device without a "
    "filter.",
    "The tenant shall give written notice of any defect without undue delay; failing that, he is liable for the resulting damage.",
    "Subject to section 12, the licensee may not sublicense, sell or otherwise transfer the software to a third party.",
    "Employees who work from home must connect through the company network and lock their screen when they leave the desk.",
    "Meeting moved to Tue 14:30, room B-207; agenda: budget, hiring, release 2.4.1.",
    "def mean(values): return sum(values) / len(values) if values else 0.0",
    "SELECT name, COUNT(*) FROM orders JOIN customers USING (customer_id) WHERE year = 2021 GROUP BY name ORDER BY 2 DESC LIMIT "
    "10;",
    "TypeError: cannot read property 'length' of undefined at parse (index.js:42:17)",
    "git commit -m \"fix race in the cache\" && git push origin main",
    "<div class=\"card\"><h2>Title</h2><p>Some text.</p></div>",
    "{\"id\": 17, \"name\": \"sensor-4\", \"values\": [0.13, 0.14, 0.12], \"ok\": true}",
    "See https://www.example.org/docs/install.html?lang=en#linux or write to support@example.org.",
    "iPhone 12 Pro Max 256GB, graphite, unlocked - as new, with box and charger",
    "women's running shoes size 39 waterproof blue",
    "cheap flights london to lisbon november",
    "symptoms of vitamin d deficiency in adults",
    "python sort list of dictionaries by key",
    "best books about the history of mathematics for beginners",
    "ok thanks",
    "lol that was sooo funny 😂😂 can't wait for the next one!!!",
    "@anna thx for sharing, totally agree w/ you on this #climate #policy",
    "No.",
    "Yes, I think so too.",
    "...",
    "12.5 kg, 3/4 inch, -40 °C, 1,000,000 people, 50%, 9:45 a.m., 1st of May 1999",
    "Der Vertrag kann von beiden Seiten mit einer Frist von drei Monaten zum Quartalsende gekündigt werden.",
    "Am Wochenende fahren wir mit dem Zug in die Berge, wenn das Wetter mitspielt.",
    "Le train de nuit part à vingt-deux heures et arrive à la frontière au petit matin.",
    "Les chercheurs ont publié leurs résultats dans une revue internationale.",
    "La reunión se ha aplazado hasta el próximo lunes por la tarde.",
    "Il museo è chiuso il martedì, ma il giardino resta aperto fino al tramonto.",
    "O relatório anual mostra um crescimento de cinco por cento.",
    "Het regent al de hele week en de rivier staat hoog.",
    "В понедельник утром в городе выпал первый снег.",
    "我们明天早上九点在火车站见面。",
    "東京の冬は乾燥していて、晴れの日が多い。",
    "오늘 저녁에 같이 영화 보러 갈래요?",
    "الكتاب على الطاولة بجانب النافذة.",
    "Two men in orange vests are repairing a road; two workers mend a street.",
    "The kitten is drinking milk. A small cat laps up some milk.",
    "The stock market fell today. Equities closed lower on Tuesday.",
    "Nuclear power supplies about a tenth of the world's electricity. Its supporters point to low emissions and steady output, its "
    "critics to cost, waste and the risk of accidents. New reactors take ten years and more to build, and several recent projects "
    "in "
    "Europe and North America ran far over budget. Smaller reactors, made in series in a factory, are meant to change that, but "
    "none of "
    "them has yet delivered power to a grid at the price that was promised.",
    "The honey bee lives in colonies of several tens of thousands. A single queen lays all the eggs; the workers, all of them "
    "female, "
    "clean cells, feed the larvae, build comb, guard the entrance and in the last weeks of their lives collect nectar and pollen. "
    "When "
    "a forager finds a rich source she dances on the comb, and the angle and the length of her run tell the others where to fly.",
    "Open source software is developed in public and may be used, studied, changed and passed on by anyone. Companies contribute "
    "to it "
    "because shared foundations are cheaper than private ones, volunteers because they enjoy the work or need the result. The "
    "model has "
    "its weak points: small libraries on which millions of programs depend are often kept by one unpaid person, and a mistake "
    "there "
    "travels far.",
    "In chess, a pawn that reaches the last rank is promoted, usually to a queen. The rule decides most endgames: with kings and a "
    "few "
    "pawns left, the side whose pawn runs first wins, so that counting moves matters more than any attack. Grandmasters learn "
    "hundreds of "
    "such positions by heart, and computers have by now listed every position with seven pieces or fewer together with its "
    "outcome.",
};
// NOLINTEND(bugprone-suspicious-missing-comma)
