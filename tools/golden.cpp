#include "golden.h"

#include "encode.h"
#include "pictures.h"

#include <utility>

// Questions, statements, several scripts, numbers, code, and one of more than a hundred tokens.
const std::vector<std::string> golden_texts = {
    "A cat sits on the mat.",
    "How do I change the password of my account?",
    "What is the difference between a list and a tuple in Python?",
    "Stocks fell sharply on Tuesday as investors weighed higher interest rates against slowing growth.",
    "The invoice of 2023-11-07 over $1,249.99 (incl. 19% VAT) was paid on the 3rd, at 08:45.",
    "for (size_t i = 0; i < n; ++i) sum += x[i] * y[i];  // dot product",
    "Die Straßenbahn fährt heute wegen Bauarbeiten nicht bis zum Hauptbahnhof.",
    "El café de la esquina abre a las siete y cierra cuando se va el último cliente.",
    "Москва — столица России, крупнейший город страны.",
    "今日はとても良い天気なので、公園まで散歩に行きましょう。",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "Photosynthesis is the process by which green plants, algae and some bacteria turn light into chemical energy. In the leaves, "
    "chlorophyll absorbs mostly red and blue light; its energy splits water into oxygen, which leaves the plant, and hydrogen, "
    "which "
    "carries the energy on. In a second set of reactions, which need no light, carbon dioxide from the air is built step by step "
    "into "
    "sugars. These feed the plant itself and, in the end, nearly every animal on land and in the sea. How much is made depends on "
    "the "
    "light, on temperature, on water and on the carbon dioxide of the air, so that a dry summer or a cloudy spring can be read, "
    "years "
    "later, in the width of a tree's rings.",
};

std::vector<float> golden_embeddings(const rs_model *model, const std::vector<std::string> &texts) {
  auto params = sized<rs_encode_params>();
  params.prompt = "";
  session_ptr session = create_session(model, 0, false);
  return encode_texts(session.get(), texts, params, model_info(model).dim).values;
}

std::vector<float> golden_image_embeddings(const rs_model *model, size_t n) {
  session_ptr session = create_session(model, 0, false);
  const std::vector<picture> pictures = make_pictures(n, 1);
  const std::vector<rs_image> images = views_of(pictures);
  std::vector<float> vectors(n * size_t(model_info(model).dim));
  check(rs_encode_images(session.get(), images.data(), n, nullptr, vectors.data(), vectors.size(), nullptr));
  return vectors;
}

golden_cosines compare_golden(const std::vector<float> &expected, const std::vector<float> &got, size_t n) {
  golden_cosines result;
  size_t dim = n > 0 ? expected.size() / n : 0;
  bool first = true;
  for (size_t i = 0; i < n; ++i) {
    double value = cosine(expected.data() + i * dim, got.data() + i * dim, dim);
    result.each.push_back(float(value));
    result.mean += value / double(n);
    if (std::exchange(first, false) || !(value >= result.lowest)) result.lowest = value;  // NaN is the lowest
  }
  return result;
}
