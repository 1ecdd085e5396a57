const cards = document.getElementById("cards");
const figures = [...cards.children];
const form = document.getElementById("filters");
const count = document.getElementById("count");
const number = new Intl.NumberFormat("en");

/** Show the cards that the form asks for, in the order it asks for. */
function show() {
  const asked = Object.fromEntries(new FormData(form));
  const words = asked.words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const figure of figures) {
    const caption = figure.querySelector("p").textContent.toLowerCase();
    const wanted =
      (!asked.tag || figure.dataset.tags.split("|").includes(asked.tag)) &&
      (!asked.verdict || figure.dataset.verdict === asked.verdict) &&
      words.every((word) => caption.includes(word));
    figure.hidden = !wanted;
    shown += wanted;
  }
  count.textContent = `${number.format(shown)} of ${number.format(figures.length)} shown`;
}

/** Put the cards in order; those without a score come last. */
function sort() {
  const [metric, end] = (form.order?.value ?? "").split(", ");
  const sign = end === "highest first" ? -1 : 1;
  const score = (figure) => JSON.parse(figure.dataset.scores)[metric];
  const rank = (figure) => (score(figure) === undefined ? Infinity : sign * score(figure));
  const keys = new Map(figures.map((figure) => [figure, end ? rank(figure) : 0]));
  cards.append(...figures.toSorted((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b))));
}

/** Pictures of a few pixels are shown as such. */
function sharpen(image) {
  image.classList.toggle("small", image.naturalWidth > 0 && image.naturalWidth <= 64);
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => (event.target.name === "order" ? sort() : show()));
cards.addEventListener("load", (event) => sharpen(event.target), true);
for (const image of cards.querySelectorAll("img")) sharpen(image);
sort();
show();
