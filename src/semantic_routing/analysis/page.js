// Draws the weights of every layer in every block; a slider chooses the time.
const data = JSON.parse(document.getElementById("weights").textContent);
const canvas = document.getElementById("map");
const slider = document.getElementById("time");
const reading = document.getElementById("reading");
const depth = data.weights[0].length, layers = data.weights[0][0].length;
const cell = { w: Math.max(14, Math.min(60, 960 / layers)), h: Math.max(14, Math.min(34, 620 / depth)) };
const longest = Math.max(...data.names.map(name => name.length));
const margin = { left: Math.max(46, 14 + 7 * longest), top: 6, bottom: 40 };
const top_ = Math.max(2 / layers, ...data.weights.flat(2));
const ratio = window.devicePixelRatio || 1;
const width = margin.left + layers * cell.w + 6, height = margin.top + depth * cell.h + margin.bottom;
canvas.width = width * ratio;
canvas.height = height * ratio;
canvas.style.maxWidth = width + "px";

function color(share) { // white to dark blue
  const stops = [[247, 251, 255], [107, 174, 214], [8, 48, 107]];
  const place = Math.min(1, share) * 2, i = Math.min(1, Math.floor(place)), f = place - i;
  return `rgb(${stops[i].map((c, k) => Math.round(c + f * (stops[i + 1][k] - c))).join(",")})`;
}

function every(count) { return Math.ceil(count / 12); }

function draw() {
  const at = slider ? Number(slider.value) : 0;
  if (slider) document.getElementById("told").textContent = data.times[at].toFixed(2);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  data.weights[at].forEach((row, d) => row.forEach((weight, l) => {
    pen.fillStyle = color(weight / top_);
    pen.fillRect(margin.left + l * cell.w, margin.top + d * cell.h, cell.w - 1, cell.h - 1);
  }));
  pen.fillStyle = getComputedStyle(document.body).color;
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "center";
  for (let l = 0; l < layers; l += every(layers))
    pen.fillText(l + 1, margin.left + (l + 0.5) * cell.w, margin.top + depth * cell.h + 16);
  pen.fillText("language-model layer", margin.left + layers * cell.w / 2, height - 6);
  pen.textAlign = "right";
  for (let d = 0; d < depth; d += every(depth))
    pen.fillText(data.names[d], margin.left - 6, margin.top + (d + 0.5) * cell.h + 4);
}

canvas.addEventListener("mousemove", event => {
  const box = canvas.getBoundingClientRect(), scale = width / box.width;
  const l = Math.floor(((event.clientX - box.left) * scale - margin.left) / cell.w);
  const d = Math.floor(((event.clientY - box.top) * scale - margin.top) / cell.h);
  if (l < 0 || d < 0 || l >= layers || d >= depth) return;
  const at = slider ? Number(slider.value) : 0;
  reading.textContent = `${data.rows[d]}, layer ${l + 1}: ${(100 * data.weights[at][d][l]).toFixed(2)} %; ` +
    `centre ${data.centers[at][d].toFixed(3)}, ${data.effective[at][d].toFixed(1)} effective layers`;
});
if (slider) slider.addEventListener("input", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
